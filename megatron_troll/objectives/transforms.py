"""DFPO's group transforms of sequence weights (arXiv 2604.13088; ALGORITHMS 4.2).

weights, advantage [R] float64, one entry per response; group [R] int64 in [0, groups). All transforms return
[R] and are differentiable in the weights. Every group's advantages must sum to 0: see `refuse_groups`.
"""

import torch
from torch import Tensor

from megatron_troll.objectives.budget import scan

# Largest |sum A| / sum |A| that counts as rounding of centred advantages.
CENTRED = 1e-4


def totals(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """[R] sum over the response's group."""
    return values.new_zeros(groups).index_add(0, group, values)[group]


def lowest(weights: Tensor, advantage: Tensor, group: Tensor, groups: int) -> Tensor:
    """Min-Replace: every response has the smallest weight of its group."""
    start = weights.new_full((groups,), float("inf"))
    return start.scatter_reduce(0, group, weights, "amin")[group]


def orthogonal(weights: Tensor, advantage: Tensor, group: Tensor, groups: int) -> Tensor:
    """Eq. 18: s - (A.s / |A|^2) A. May be negative, which reverses an update."""
    square = totals(advantage.square(), group, groups)
    slope = totals(advantage * weights, group, groups) / torch.where(square > 0, square, 1.0)
    return weights - slope * advantage


def nearest(weights: Tensor, advantage: Tensor, group: Tensor, groups: int) -> Tensor:
    """Eq. 51, exactly: the weights v >= 0 nearest to s > 0 with A.v = 0, v = max(s - nu A, 0)."""
    return (weights - multiplier(weights, advantage, group, groups) * advantage).clamp(min=0.0)


def multiplier(weights: Tensor, advantage: Tensor, group: Tensor, groups: int) -> Tensor:
    """[R] nu of the response's group: the root of f(nu) = A.max(s - nu A, 0). O(R log R).

    With the sign of A chosen so that f(0) >= 0, nu >= 0 and only entries with A > 0 reach 0, at s / A. Then f
    is convex: the maximum of its linear pieces sum_{S} A s - nu sum_{S} A^2, where S drops the entries with
    the smallest s / A. So nu is the largest root of these pieces.
    """
    sign = torch.where(totals(advantage * weights, group, groups) < 0, -1.0, 1.0).detach()
    tilted = sign * advantage
    reached = torch.where(tilted > 0, weights.detach() / tilted, float("inf"))
    order = reached.argsort(stable=True)
    # From the last entry of a group to the first, so that each running sum is a sum over S.
    order = order[group[order].argsort(stable=True)].flip(0)
    owner = group[order]
    rise = scan((tilted * weights)[order], owner, torch.add)
    fall = scan(tilted.square()[order], owner, torch.add)
    drops = (tilted[order] > 0) & (fall > 0)
    roots = torch.where(drops, rise / torch.where(drops, fall, 1.0), 0.0)
    return sign * weights.new_zeros(groups).scatter_reduce(0, owner, roots, "amax")[group]


def rebalanced(weights: Tensor, advantage: Tensor, group: Tensor, groups: int, floor: float) -> Tensor:
    """Truncate-rebalance: the heavier side of s+ = max(s, floor) is scaled down to the lighter one. Eq. 55
    prints a minus sign before the factor of the negative side, which would make weights negative."""
    raised = weights.clamp(min=floor)
    gain = totals((advantage * raised).clamp(min=0.0), group, groups)
    loss = totals((-advantage * raised).clamp(min=0.0), group, groups)
    heavier = torch.where(advantage > 0, gain, loss)
    balanced = torch.minimum(gain, loss) / torch.where(heavier > 0, heavier, 1.0)
    return raised * torch.where((advantage != 0) & (heavier > 0), balanced, 1.0)


def refuse_groups(advantage: Tensor, group: Tensor, names: Tensor) -> None:
    """Raises ValueError for groups of one response and groups whose advantages do not sum to 0. names
    [groups]: the index of each group's prompt in the rollout batch. Waits for the device."""
    groups = len(names)
    alone = totals(torch.ones_like(advantage), group, groups) < 2
    if bool(alone.any()):
        raise ValueError(
            f"prompts {_named(names, group, alone)} have one response in the step: group transforms need "
            "rollout.samples >= 2 and whole groups in an optimizer step"
        )
    tilt = totals(advantage, group, groups).abs() > CENTRED * totals(advantage.abs(), group, groups)
    if bool(tilt.any()):
        raise ValueError(
            f"the advantages of prompts {_named(names, group, tilt)} do not sum to 0: group transforms need "
            "centred advantages and whole groups in an optimizer step"
        )


def _named(names: Tensor, group: Tensor, rows: Tensor) -> list[int]:
    return names[group[rows].unique()][:8].tolist()
