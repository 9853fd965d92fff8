"""The fixed batch that every method is given on every layout."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from megatron_troll.types import NO_ID, Rollout, TokenTopK
from tests.dist.layouts_batch import Weights, make_batch
from tests.dist.layouts_reference import read
from tests.dist.tiny import MOE, reference

SEED = 5
ENGINE_K = 14
# How far the rollout engine's logits lie from those of the weights it was given, as its arithmetic differs.
ENGINE_NOISE = 0.15
# Centred over each prompt, as group transforms need: 3, 3, 2 and 2 responses. The last but one is empty.
ADVANTAGES = (1.4, -0.7, -0.7, -1.1, 0.9, 0.2, -0.8, 0.8, -0.9, 0.9)


@dataclass(frozen=True)
class Batch:
    """Rollouts whose engine had the law `engine` [N, V] float64 at the N loss tokens; an advantage for each,
    and for each token [T]; the weights before and inside the update, and of the reference model."""

    rollouts: list[Rollout]
    engine: Tensor
    advantages: list[float]
    token_advantages: list[np.ndarray]
    before: Weights
    now: Weights
    frozen: Weights


def make_methods_batch() -> Batch:
    """What masked tokens say is NaN: nothing may read it."""
    drawn = make_batch("moe")
    generator = torch.Generator().manual_seed(SEED)
    before = read(model_of(drawn.before), drawn.rollouts).logits.detach()
    noise = torch.randn(before.shape, generator=generator, dtype=torch.float64)
    engine = (before + ENGINE_NOISE * noise).log_softmax(1)
    rollouts = list(_recorded(drawn.rollouts, engine, generator))
    token_advantages = [torch.randn(len(r.mask), generator=generator).double().numpy() for r in rollouts]
    frozen = {name: _moved(tensor, generator) for name, tensor in drawn.before.items()}
    return Batch(rollouts, engine, list(ADVANTAGES), token_advantages, drawn.before, drawn.now, frozen)


def model_of(weights: Weights) -> nn.Module:
    """Hugging Face's model in float64."""
    model = reference(MOE).double()
    model.set_experts_implementation("eager")  # the grouped one has no float64
    model.load_state_dict(weights)
    return model


def _moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    size = 0.05 * tensor.std() if tensor.dim() > 1 else torch.tensor(0.02)
    return tensor + size * torch.randn(tensor.shape, generator=generator)


def _recorded(rollouts: list[Rollout], engine: Tensor, generator: torch.Generator) -> Iterator[Rollout]:
    """The rollouts with what the engine says of their loss tokens."""
    laws = engine.split([int(rollout.mask.sum()) for rollout in rollouts])
    for rollout, law in zip(rollouts, laws):
        told = torch.from_numpy(rollout.mask) > 0
        best = law.topk(ENGINE_K, 1)
        sampled = law.gather(1, torch.from_numpy(rollout.response_ids)[told][:, None])[:, 0]
        yield replace(
            rollout,
            logp=_placed(sampled, told, np.nan).astype(np.float32),
            key=int(torch.randint(1 << 62, (), generator=generator)),
            topk=TokenTopK(
                _placed(best.indices, told, NO_ID).astype(np.int32),
                _placed(best.values, told, np.nan).astype(np.float32),
            ),
        )


def _placed(values: Tensor, told: Tensor, fill: float) -> np.ndarray:
    """[T, ...]: `values` where the token carries loss, `fill` elsewhere."""
    whole = values.new_full((len(told), *values.shape[1:]), fill)
    whole[told] = values
    return whole.numpy()
