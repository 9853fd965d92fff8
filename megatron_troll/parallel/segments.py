"""Sums over the tokens of one response, some of which may be on other context-parallel ranks."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_troll.parallel.groups import Group
from megatron_troll.types import Segments


def segments(sequence: Tensor, position: Tensor, n_sequences: int, cp_group: Group) -> Segments:
    """Reductions over the responses of one micro-batch. `sequence` [N] int64 is the response of each local
    token, below `n_sequences`; `position` [N] int64 is the token's index in it. `n_sequences` is the same on
    every context-parallel rank; N may differ.

    `sum` sends `n_sequences` numbers in one all-reduce, and as many in backward; `whole` sends N numbers of
    every rank; building the segments under context parallelism sends 2 N. Every rank of the group must call
    them, and the backward of `sum`, in the same order. They keep the dtype of their argument. A response
    without tokens has total 0.
    """

    def total(values: Tensor) -> Tensor:
        local = values.new_zeros(n_sequences).index_add(0, sequence, values)
        if cp_group.size == 1:
            return local
        result = _SumOverRanks.apply(local, cp_group)
        assert isinstance(result, Tensor)
        return result

    def expand(totals: Tensor) -> Tensor:
        return totals.index_select(0, sequence)

    if cp_group.size == 1:
        return Segments(sum=total, expand=expand, whole=_detached, mine=_detached, owner=sequence)
    share = _Share.of(sequence, position, cp_group)
    return Segments(total, expand, share.whole, share.mine, share.owner)


def _detached(values: Tensor) -> Tensor:
    return values.detach()


@dataclass(frozen=True)
class _Share:
    """One rank's part of the tokens of all context-parallel ranks.

    lengths  tokens of each rank
    order    [L] index of each token, in order of response and position, in the ranks' concatenated tokens
    place    [N] index of each of this rank's tokens in that order
    owner    [L] the response of each token in that order
    """

    group: Group
    lengths: list[int]
    order: Tensor
    place: Tensor
    owner: Tensor

    @staticmethod
    def of(sequence: Tensor, position: Tensor, group: Group) -> "_Share":
        length = torch.tensor([len(sequence)], device=sequence.device)
        lengths = [int(part) for part in group.all_gather(length)]
        sequences, positions = (_concatenated(column, lengths, group) for column in (sequence, position))
        longest = int(positions.max()) + 1 if len(positions) else 1
        order = torch.argsort(sequences * longest + positions)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        start = sum(lengths[: group.rank])
        return _Share(group, lengths, order, place[start : start + lengths[group.rank]], sequences[order])

    def whole(self, values: Tensor) -> Tensor:
        return _concatenated(values.detach(), self.lengths, self.group)[self.order]

    def mine(self, values: Tensor) -> Tensor:
        return values[self.place]


def _concatenated(values: Tensor, lengths: list[int], group: Group) -> Tensor:
    """The ranks' values [sum of lengths], one rank after the other."""
    padded = values.new_zeros(max(lengths))
    padded[: len(values)] = values
    return torch.cat([part[:length] for part, length in zip(group.all_gather(padded), lengths)])


class _SumOverRanks(Function):
    """All-reduce in forward and backward. The gradient is that of the sum of the ranks' losses, each of which
    reads the total: d(sum of losses)/d(local) = sum over ranks of d(loss of that rank)/d(total)."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return group.all_reduce(local.clone())

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None]:
        return ctx.group.all_reduce(upstream.clone(memory_format=torch.contiguous_format)), None
