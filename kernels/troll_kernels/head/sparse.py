"""Logits at a few columns per row, differentiable: the K-column backward of the LM head, which is exact for
objectives that read only the renormalised support (ALGORITHMS 1.7)."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from troll_kernels.head.shard import grad_sums
from troll_kernels.hidden_grad import hidden_grad
from troll_kernels.logits_at import logits_at
from troll_kernels.weight_grad import add_weight_grad


def sparse_logits(
    hidden: Tensor,
    weight: Tensor,
    columns: Tensor,
    values: Tensor | None = None,
    main_grad: Tensor | None = None,
) -> Tensor:
    """Raw logits [N, W] of this shard at `columns` [N, W] int64, -inf where the column is below 0.

    hidden [N, H], weight [V_local, H]. `values` [N, W]: the logits, if they are already computed; otherwise
    the K-column forward computes them. If `main_grad` [V_local, H] (float32, rows contiguous) is given,
    backward adds the gradient of weight to it, whether or not weight requires one, and returns none to
    autograd; otherwise backward returns a dense one. Saves the arguments; backward holds the temporaries of
    `hidden_grad` and `add_weight_grad`.
    """
    if values is None:
        values = logits_at(hidden, weight, columns)
    result = _SparseLogits.apply(hidden, weight, columns, values, main_grad)
    assert isinstance(result, Tensor)
    return result


class _SparseLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, columns: Tensor, values: Tensor, main_grad: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, columns)
        ctx.main_grad = main_grad
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, columns = ctx.saved_tensors
        hidden_part = weight_part = None
        if ctx.needs_input_grad[0]:
            hidden_part = hidden_grad(upstream, columns, weight).to(hidden.dtype)
        if ctx.main_grad is not None or ctx.needs_input_grad[1]:
            sums = grad_sums(weight, ctx.main_grad)
            add_weight_grad(sums, upstream, columns, hidden)
            weight_part = sums.to(weight.dtype) if ctx.main_grad is None else None
        return hidden_part, weight_part, None, None, None
