"""Asym of arXiv 2604.13088 (eq. 23; ALGORITHMS 4): how unequally the responses to a prompt pull.

w_i A_i is the advantage of a response times its weight: what multiplies grad log pi of its tokens, after the
trust region's limit, averaged over them. Under DFPO it is s~_i A_i, under GSPO s_bar_i A_i (eq. 49, clipped
or not), under token ratios the mean of the limited ratios times A_i. Corrections for the rollout policy are
left out.
"""

import torch
from torch import Tensor

from megatron_troll.types import ObjectiveInputs


def pulls_of(weighted: Tensor, inputs: ObjectiveInputs) -> Tensor:
    """w_i A_i [S] float64 from w_t A_t [N], detached; NaN for a response without tokens."""
    total = inputs.segments.sum(weighted.double())
    return total / inputs.segments.sum(torch.ones_like(weighted, dtype=torch.float64))


def totals_of(pulls: Tensor | None, inputs: ObjectiveInputs) -> Tensor:
    """[3, rollouts] float64: times counted, sum of w_i A_i, sum of the group's index; 0 without pulls. To be
    added up over micro-batches and ranks; context-parallel ranks all count the responses that they share."""
    zeros = torch.zeros(3, inputs.rollouts, dtype=torch.float64, device=inputs.group.device)
    if pulls is None:
        return zeros
    columns = torch.stack((torch.ones_like(pulls), pulls, inputs.group.double()))
    return zeros.index_add(1, inputs.rollout, torch.where(pulls.isfinite(), columns, 0.0))


def asymmetry(totals: Tensor) -> float | None:
    """The mean over groups of Var_i(w_i A_i), without Bessel's correction; None without a group of two. Waits
    for the device."""
    copies, value, group = totals[:, totals[0] > 0]
    _, group = (group / copies).round().long().unique(return_inverse=True)
    size = torch.bincount(group).double()
    value = value / copies
    apart = value - (torch.bincount(group, value) / size)[group]
    variance = torch.bincount(group, apart.square()) / size
    several = variance[size > 1]
    return float(several.mean()) if len(several) else None
