"""Sums over the tokens of one response, some of which may lie on other context-parallel ranks."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_troll.parallel.groups import Group
from megatron_troll.types import Segments


def segments(sequence: Tensor, n_sequences: int, cp_group: Group) -> Segments:
    """Reductions over the responses of one micro-batch. `sequence` [N] int64 names the response of each local
    token, below `n_sequences`, which is the same on every context-parallel rank (N need not be).

    `sum` sends `n_sequences` numbers in one all-reduce, and as many in backward; every rank of the group must
    call it, and its backward, in the same order. It keeps the dtype of its argument. A response without a
    token has total 0.
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

    return Segments(sum=total, expand=expand)


class _SumOverRanks(Function):
    """All-reduce in both directions. What is differentiated is the sum of the ranks' losses, and each of them
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
