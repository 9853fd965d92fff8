"""CPPO's position-weighted divergence budget (arXiv 2606.10968, eq. 8 and 9; ALGORITHMS 2).

    S_t = sum_{j<=t} w_j D_j,  W_t = sum_{j<=t} w_j
    c_t = min(delta, delta + delta_b W_{t-1} - S_{t-1})      the threshold on w_t D_t

All tensors are [L]: every token of each response in order, masked or not. Sums run in float64.

The scans below serve every method that depends on the earlier tokens of a response: [L] holds the tokens of
all responses, one response after the other; owner [L] is the index of each token's response. No value
crosses from one response to the next.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def scan(values: Tensor, owner: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[L] inclusive scan over each response with an associative `combine` (torch.add, torch.minimum, ...).

    log2(L) passes (Hillis and Steele, 1986). No value, infinities included, crosses between responses.
    """
    reach = 1
    while reach < len(values):
        joined = combine(values[:-reach], values[reach:])
        tail = torch.where(owner[reach:] == owner[:-reach], joined, values[reach:])
        values = torch.cat((values[:reach], tail))
        reach *= 2
    return values


def before(values: Tensor, owner: Tensor, first: float) -> Tensor:
    """[L] the value of the previous token of the same response, `first` for the first token."""
    shifted = torch.cat((values.new_full((1,), first), values))[:-1]
    return torch.where(starts(owner), first, shifted)


def starts(owner: Tensor) -> Tensor:
    """[L] bool, whether a token is the first of its response."""
    return torch.cat((owner.new_full((1,), -1), owner))[:-1] != owner


def places(owner: Tensor) -> Tensor:
    """[L] int64, index of each token in its response."""
    return scan(torch.ones_like(owner), owner, torch.add) - 1


def quantile(values: Tensor, owner: Tensor, share: float) -> Tensor:
    """[L] the `share` quantile of the values of each token's response, linear between the two nearest of them
    in order: at `share` (T - 1) of 0, ..., T - 1. owner must be sorted."""
    order = values.argsort()
    order = order[owner[order].argsort(stable=True)]
    place = places(owner)
    first = torch.arange(len(owner), device=owner.device) - place
    size = scan(place.flip(0), owner.flip(0), torch.maximum).flip(0) + 1
    at = share * (size - 1).double()
    inside, low = values[order], at.floor()
    below, above = inside[first + low.long()], inside[first + at.ceil().long()]
    # Two infinite values have no difference.
    return torch.where(below == above, below, below + (at - low).to(values.dtype) * (above - below))


# The paper's (delta, delta_b) for each divergence (sections 4.1 and 4.3).
TV, KL = (0.15, 0.02), (0.1, 0.002)
# Every delta and every delta_b of the paper's runs with TV.
OF_TV = (0.15, 0.2), (0.015, 0.02, 0.03)


def schedule(step: Tensor, horizon: Tensor | float, w_min: float) -> Tensor:
    """w_t = 1 - (1 - w_min) (t - 1) / (T - 1) at step = t - 1, in float64; w_min past the horizon T, and 1
    if T is 1."""
    last = torch.as_tensor(horizon, dtype=torch.float64, device=step.device) - 1.0
    return 1.0 - (1.0 - w_min) * torch.where(last > 0, (step / last).clamp(max=1.0), 0.0)


def raw_thresholds(
    divergence: Tensor, weight: Tensor, owner: Tensor, delta: float, delta_b: float | Tensor
) -> Tensor:
    """c_t when S accumulates the unchanged divergences; delta_b: one number, or [L], one for each response.
    Negative once the budget is overspent."""
    left = scan(delta_b * weight - weight * divergence.double(), owner, torch.add)
    return (delta + before(left, owner, 0.0)).clamp(max=delta)


def kept_thresholds(
    divergence: Tensor, weight: Tensor, owner: Tensor, delta: float, delta_b: float
) -> Tensor:
    """c_t when every token is limited to its own threshold, so that S accumulates min(w_t D_t, c_t).

    The remaining budget, B_t = delta + delta_b W_{t-1} - S_{t-1} >= 0, then follows
    B_{t+1} = max(B_t - a_t, 0) + b_t with a_t = min(w_t D_t, delta), b_t = delta_b w_t (Lindley's recursion).
    With U_t = sum_{s<=t} (b_s - a_s) it is B_{t+1} = U_t + max(B_1, max_{s<=t} (b_s - U_s)): two scans.
    """
    spent = (weight * divergence.double()).clamp(max=delta)
    income = delta_b * weight
    net = scan(income - spent, owner, torch.add)
    left = net + scan(income - net, owner, torch.maximum).clamp(min=delta)
    return before(left, owner, delta).clamp(max=delta)
