"""Divergences over full rows that are split over tensor-parallel ranks."""

import torch
from torch import Tensor

from megatron_troll.parallel.groups import Group


def kl(logp: Tensor, logq: Tensor, group: Group) -> Tensor:
    """KL(p || q) [M] from shards [M, V / tp] of their log-probabilities. One all-reduce of M numbers."""
    terms = torch.where(logp > -torch.inf, logp.exp() * (logp - logq), 0.0)
    return group.all_reduce(terms.sum(1))
