"""Per-response quantities on the tokens that an objective sees."""

import torch
from torch import Tensor

from megatron_troll.objectives.slots import Diagnostics, Reduction
from megatron_troll.types import ObjectiveInputs

DECILES = 10


def lengths(inputs: ObjectiveInputs) -> Tensor:
    """[N] number of tokens of the response that each token belongs to."""
    return inputs.segments.expand(inputs.segments.sum(torch.ones_like(inputs.advantage)))


def maximum(values: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """[N] largest value of the token's response. values [N] detached."""
    segments = inputs.segments
    lowest = values.new_full((len(inputs.rollout),), float("-inf"))
    return segments.expand(lowest.scatter_reduce(0, segments.owner, segments.whole(values), "amax"))


def once(values: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """[N] a diagnostic that counts once per response: NaN except on the first token of the response."""
    return torch.where(inputs.position == 0, values, float("nan"))


def by_decile(name: str, values: Tensor, inputs: ObjectiveInputs) -> dict[str, Tensor]:
    """values [N] per tenth of each response, NaN outside it: tenth i starts at i/10 of the length."""
    decile = torch.floor(DECILES * inputs.position / lengths(inputs))
    return {f"{name}_decile_{i}": torch.where(decile == i, values, float("nan")) for i in range(DECILES)}


def decile_diagnostics(name: str, *reductions: Reduction) -> Diagnostics:
    return {f"{name}_decile_{i}": reductions for i in range(DECILES)}
