"""The fixed batches and the objectives that every layout is given."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Optimizer, Slot
from megatron_troll.types import FinishReason, Message, Prompt, Rollout, TokenTopK, marked
from tests.dist.tiny import DENSE, MOE, NEXT, logits_of, reference

TEMPERATURE = 0.8
# Layers that add little to a large residual keep rounding small beside the tolerance; the head is peaked
# enough that delta, not k, ends some supports.
SCALES = {"embed_tokens": 2.0, "o_proj": 0.5, "experts": 0.5, "mlp.gate": 0.5, "lm_head": 4.0}
HYBRID_SCALES = SCALES | {"out_proj": 0.5, "shared_expert.": 0.5}


@dataclass(frozen=True)
class Kind:
    """A model by its Hugging Face config, and the seed and scales of its weights."""

    config: dict[str, Any]
    seed: int
    scales: dict[str, float]


KINDS = {
    "moe": Kind(MOE, 6, SCALES),
    "hybrid": Kind(NEXT, 3, HYBRID_SCALES),
    "tied-dense": Kind(DENSE | {"tie_word_embeddings": True}, 5, {"embed_tokens": 0.4, "o_proj": 0.5}),
    "capped-dense": Kind(DENSE | {"final_logit_softcapping": 10.0}, 1, {"o_proj": 0.5, "lm_head": 8.0}),
}
Weights = dict[str, Tensor]

# (group, prompt tokens, response tokens, advantage)
SHAPES = (
    (0, 5, 13, 1.4),
    (0, 5, 4, -0.7),
    (0, 5, 9, -0.7),
    (1, 11, 17, 0.9),
    (1, 11, 1, -1.1),
    (1, 11, 8, 0.2),
    (2, 2, 11, -0.6),
    (2, 2, 6, 1.2),
    (3, 8, 12, -0.9),
    (3, 8, 7, 0.9),
)
TOOL = (3, slice(5, 10))  # the tokens of rollout 3 that a tool wrote
OVERLONG = 8  # cut at the length limit and taken out of the loss

# A large eps, so that a step is smooth in the gradients.
OPTIMIZER = Optimizer(lr=0.1, weight_decay=0.05, grad_norm=0.1, eps=1e-2, distributed=False)
EPS_LOW, EPS_HIGH = 0.2, 0.25
BOUND, ALPHA, K, DELTA, P_D = 0.05, 0.7, 12, 0.02, 1e-5
CLIP = {"name": "clip", "eps_low": EPS_LOW, "eps_high": EPS_HIGH}
TROLL = {"name": "troll", "bound": BOUND, "alpha": ALPHA, "k": K, "delta": DELTA, "p_d": P_D}
OBJECTIVES = {
    "clip": ObjectiveConfig(trust_region=Slot.model_validate(CLIP), aggregation="seq-mean-token-mean"),
    "troll-own": ObjectiveConfig(trust_region=Slot.model_validate(TROLL | {"support": "own"})),
    "troll-old": ObjectiveConfig(trust_region=Slot.model_validate(TROLL | {"support": "old"})),
}


@dataclass(frozen=True)
class Batch:
    """Rollouts with one advantage each, the rollout engine's log-probs [N, V] at the N loss tokens, and the
    weights before and inside the update."""

    config: dict[str, Any]
    rollouts: list[Rollout]
    advantages: list[float]
    law: Tensor
    before: Weights
    now: Weights


def make_batch(kind: str) -> Batch:
    """Responses sampled from `before`; `now` differs from it by a twentieth of a weight's size, so that
    ratios leave their trust regions on some tokens and not on others."""
    config, seed, scales = KINDS[kind].config, KINDS[kind].seed, KINDS[kind].scales
    model = reference(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= next((scale for part, scale in scales.items() if part in name), 1.0)
        rollouts, laws = zip(*_rollouts(model, config["vocab_size"], generator))
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        now = {name: _moved(tensor, generator) for name, tensor in before.items()}
    return Batch(config, list(rollouts), [shape[-1] for shape in SHAPES], torch.cat(laws), before, now)


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    size = 0.05 * tensor.std() if tensor.dim() > 1 else torch.tensor(0.02)
    return tensor + size * torch.randn(tensor.shape, generator=generator)


def _rollouts(
    model: torch.nn.Module, vocab: int, generator: torch.Generator
) -> Iterator[tuple[Rollout, Tensor]]:
    """Each response, and the engine's log-probs at its loss tokens."""
    prompts: dict[int, Tensor] = {}
    for i, (group, prompt_length, length, _) in enumerate(SHAPES):
        if group not in prompts:
            prompts[group] = torch.randint(0, vocab, (prompt_length,), generator=generator)
        ids, law = _respond(model, prompts[group], length, generator)
        mask = np.ones(length, np.float32)
        if i == TOOL[0]:
            mask[TOOL[1]] = 0
        if i == OVERLONG:
            mask[:] = 0
        yield _rollout(i, prompts[group].numpy(), ids, mask, law), law[torch.from_numpy(mask) > 0]


def _respond(
    model: torch.nn.Module, prompt: Tensor, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Sampled tokens [T], and a law [T, V] that differs from the model's as a rollout engine's does."""
    ids, laws = prompt, []
    for _ in range(length):
        logits = logits_of(model, ids[None])[0, -1] / TEMPERATURE
        ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)])
        laws.append((logits + 0.01 * torch.randn(logits.shape, generator=generator)).log_softmax(-1))
    return ids[len(prompt) :], torch.stack(laws)


def _rollout(i: int, prompt: np.ndarray, ids: Tensor, mask: np.ndarray, law: Tensor) -> Rollout:
    finish: FinishReason = "length" if i == OVERLONG else "stop"
    group, top = SHAPES[i][0], law.topk(K)
    return Rollout(
        prompt=Prompt(f"p{group}", (Message("user", "?"),), answer=""),
        group=group,
        sample=i,
        prompt_ids=prompt,
        response_ids=ids.numpy(),
        marks=marked(mask, np.zeros(len(ids))),
        logp=law.gather(1, ids[:, None])[:, 0].numpy(),
        key=0,
        topk=TokenTopK(top.indices.int().numpy(), top.values.numpy()),
        text="",
        finish=finish,
        temperature=TEMPERATURE,
    )
