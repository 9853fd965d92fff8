"""Optimal budgeted rejection sampling of tokens (Jackpot, arXiv 2602.06107; ALGORITHMS 5).

A token drawn from the proposal q is accepted with probability min(1, p / (lam q)) for a target p; accepted
tokens follow min(q, p / lam) / Z. All log-probabilities; nothing here holds N x V unless given it.
"""

import math

import torch
from torch import Tensor

from megatron_troll.objectives.slots import importance_ratio


def accept_prob(target: Tensor, proposal: Tensor, lam: float) -> Tensor:
    """min(1, p / (lam q)), elementwise."""
    return (target - proposal - math.log(lam)).clamp(max=0.0).exp()


def log_accepted(target: Tensor, proposal: Tensor, lam: float) -> Tensor:
    """log min(q, p / lam), elementwise: the law of accepted tokens before it is normalised."""
    return torch.minimum(proposal, target - math.log(lam))


def importance(target: Tensor, proposal: Tensor, lam: float) -> Tensor:
    """max(lam, p / q), elementwise: p over the law of accepted tokens, Z left out. The log-ratio is
    clamped to [-20, 20]."""
    return importance_ratio(target, proposal).clamp(min=lam)


def kl_of_sparse(target: Tensor, other: Tensor) -> Tensor:
    """sum_v p log(p / other) [N] over slots [N, W]; a slot with p = 0 adds 0."""
    return torch.where(target == float("-inf"), 0.0, target.exp() * (target - other)).sum(1)
