"""The fixed batch and the objectives that every layout is given."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_troll.config.tree import ObjectiveConfig, Slot
from megatron_troll.types import FinishReason, Message, Prompt, Rollout
from tests.dist.tiny import MOE, reference

TEMPERATURE = 0.8
SEED = 54
# Layers that add little to a large residual keep rounding small beside the tolerance; the head is peaked
# enough that delta, not k, ends some supports.
SCALES = {"embed_tokens": 2.0, "o_proj": 0.5, "experts": 0.5, "mlp.gate": 0.5, "lm_head": 4.0}
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
    """Rollouts with one advantage each, and the weights before and inside the update."""

    rollouts: list[Rollout]
    advantages: list[float]
    before: Weights
    now: Weights


def make_batch() -> Batch:
    """Responses sampled from `before`; `now` differs from it by a twentieth of a weight's size, so that
    ratios leave their trust regions on some tokens and not on others."""
    model = reference(MOE)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= next((scale for part, scale in SCALES.items() if part in name), 1.0)
        rollouts = list(_rollouts(model, generator))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        now = {name: _moved(tensor, generator) for name, tensor in before.items()}
    return Batch(rollouts, [shape[-1] for shape in SHAPES], before, now)


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    size = 0.05 * tensor.std() if tensor.dim() > 1 else torch.tensor(0.02)
    return tensor + size * torch.randn(tensor.shape, generator=generator)


def _rollouts(model: torch.nn.Module, generator: torch.Generator) -> Iterator[Rollout]:
    prompts: dict[int, Tensor] = {}
    for i, (group, prompt_length, length, _) in enumerate(SHAPES):
        if group not in prompts:
            prompts[group] = torch.randint(0, MOE["vocab_size"], (prompt_length,), generator=generator)
        ids, logp = _respond(model, prompts[group], length, generator)
        mask = np.ones(length, np.float32)
        if i == TOOL[0]:
            mask[TOOL[1]] = 0
        if i == OVERLONG:
            mask[:] = 0
        yield _rollout(i, prompts[group].numpy(), ids, mask, logp)


def _respond(
    model: torch.nn.Module, prompt: Tensor, length: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Sampled tokens, and log-probs that differ from the model's as a rollout engine's do."""
    ids, logps = prompt, []
    for _ in range(length):
        logp = (model(ids[None]).logits[0, -1] / TEMPERATURE).log_softmax(-1)
        token = torch.multinomial(logp.exp(), 1, generator=generator)
        ids = torch.cat([ids, token])
        logps.append(logp[token] + 0.01 * torch.randn(1, generator=generator))
    return ids[len(prompt) :].numpy(), torch.cat(logps).numpy()


def _rollout(i: int, prompt: np.ndarray, ids: np.ndarray, mask: np.ndarray, logp: np.ndarray) -> Rollout:
    finish: FinishReason = "length" if i == OVERLONG else "stop"
    group = SHAPES[i][0]
    return Rollout(
        prompt=Prompt(f"p{group}", (Message("user", "?"),), answer=""),
        group=group,
        sample=i,
        prompt_ids=prompt,
        response_ids=ids,
        mask=mask,
        logp=logp.astype(np.float32),
        uniform=np.zeros(len(ids)),
        topk=None,
        text="",
        finish=finish,
        version=0,
    )
