"""Combine what is read from the shards of one vocabulary, on every tensor-parallel rank.

Each function must be called by every rank of the group with the same N; on a group of one nothing is sent.
Backward communicates nothing: every rank computes the same loss from the same result, so the upstream
gradient is the same everywhere, and each rank takes the part of its own shard.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_troll.parallel.groups import Group
from megatron_troll.types import NO_ID


def stacked(local: Tensor, group: Group) -> Tensor:
    """[N] of each rank -> [tp, N] on every rank; differentiable in the rank's own row. Sends N numbers."""
    rows = group.all_gather(local.detach())
    rows[group.rank] = local
    return torch.stack(rows)


def from_owners(local: Tensor, ids: Tensor, own: Tensor, group: Group) -> Tensor:
    """Values [N, W] of `ids` [N, W] from the rank that has each: `own` [N, W] is True on the entries of
    `local` that are this rank's. -inf where the id is NO_ID. Differentiable in `local`. All-reduces N x W."""
    result = _FromOwners.apply(local, ids, own, group)
    assert isinstance(result, Tensor)
    return result


def merged(values: Tensor, ids: Tensor, group: Group, vocab: int) -> tuple[Tensor, Tensor]:
    """The largest of every shard's k candidates: values and ids [N, min(k, vocab)], value descending, then id
    ascending. values [N, k] and ids [N, k] int64 of this shard; NO_ID marks no candidate.

    Each rank receives and orders the candidates of N / tp positions, then all of them are gathered: a rank
    sends and receives 2 N x k values and ids; gathering every candidate on every rank would take tp N x k.
    Not differentiable.
    """
    width = min(values.shape[1], vocab)
    # NO_ID has the value -inf; sort it behind every token of that value.
    ids = torch.where(ids == NO_ID, vocab, ids)
    if group.size == 1:
        return values[:, :width], ids[:, :width]
    n, size = len(values), group.size
    share = -(-n // size)
    mine = [_exchanged(column, share, group) for column in (values, ids)]
    best, best_ids = ordered(*mine)
    gathered = [torch.cat(group.all_gather(column[:, :width]))[:n] for column in (best, best_ids)]
    return gathered[0], gathered[1]


def ordered(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sort the columns of [N, C] by value descending, then id ascending."""
    by_id = ids.argsort(1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    values, by_value = values.sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _exchanged(column: Tensor, share: int, group: Group) -> Tensor:
    """[N, k] of every rank -> [share, tp * k]: all ranks' columns for this rank's share of the positions."""
    k = column.shape[1]
    padded = column.new_zeros(share * group.size, k)
    padded[: len(column)] = column
    received = group.all_to_all(padded).view(group.size, share, k)
    return received.transpose(0, 1).reshape(share, group.size * k)


class _FromOwners(Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, ids: Tensor, own: Tensor, group: Group) -> Tensor:
        ctx.save_for_backward(own)
        whole = group.all_reduce(local.masked_fill(~own, 0.0))
        return whole.masked_fill_(ids == NO_ID, -torch.inf)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return upstream.masked_fill(~own, 0.0), None, None, None
