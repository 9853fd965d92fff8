"""Full-softmax statistics with gradient, for objectives that need them. Backward recomputes the logits of
each chunk, so N x V is never held. This takes four GEMMs; the K-column path (sparse.py) needs one or none."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from troll_kernels.head.shard import Shard, grad_sums
from troll_kernels.hidden_grad import hidden_grad
from troll_kernels.logits_grad import to_logits_grad
from troll_kernels.rows import row_statistics
from troll_kernels.tiles import WIDEST
from troll_kernels.transform import widened
from troll_kernels.weight_grad import add_weight_grad


class DenseStatistics(NamedTuple):
    """Statistics of N rows of this shard, all differentiable: lse [N] float64 and mean [N] of the transformed
    logits, target [N] raw. The log-prob of the target is transform.apply(target) - lse, the entropy
    lse - mean. The formulas in `rows.row_statistics` combine shards, and autograd through them combines the
    gradients."""

    lse: Tensor
    mean: Tensor
    target: Tensor


def dense_statistics(
    hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard, main_grad: Tensor | None = None
) -> DenseStatistics:
    """Compute the statistics of every row.

    hidden [N, H], weight [V_local, H] of one dtype, target [N] int64 column, outside [0, V_local) if another
    shard holds it. `main_grad` as for `sparse_logits`.

    Saves the arguments and 2 N numbers. Forward and backward hold chunk x V_local logits (on CPU three
    times); backward recomputes them, and rounds their gradient to the dtype of hidden. The gradient of the
    mean costs nothing if the mean is not used.
    """
    return DenseStatistics(*_Dense.apply(hidden, weight, target, shard, main_grad))


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, shard: Shard, main_grad: Tensor | None
    ) -> tuple[Tensor, ...]:
        lse, mean, found = widened(hidden[:0]).new_empty(3, len(hidden))
        out = lse.double(), mean, found
        for rows, logits in shard.chunks(hidden, weight):
            statistics = row_statistics(logits, shard.width, target[rows], shard.transform, WIDEST)
            for whole, part in zip(out, statistics[:3]):
                whole[rows] = part
        ctx.save_for_backward(hidden, weight, target, out[0], out[1])
        ctx.shard, ctx.main_grad = shard, main_grad
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, lse_grad: Tensor | None, mean_grad: Tensor | None, target_grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, target, lse, mean = ctx.saved_tensors
        lse_grad = torch.zeros_like(mean) if lse_grad is None else lse_grad.to(mean.dtype)
        wanted = ctx.main_grad is not None or ctx.needs_input_grad[1]
        sums = grad_sums(weight, ctx.main_grad) if wanted else None
        hidden_sum = torch.empty_like(hidden)
        for rows, logits in ctx.shard.chunks(hidden, weight):
            mean_part = None if mean_grad is None else mean_grad[rows]
            statistics = lse[rows], mean[rows], lse_grad[rows], mean_part
            to_logits_grad(logits, ctx.shard.width, *statistics, ctx.shard.transform)
            torch.mm(logits, weight, out=hidden_sum[rows])
            if sums is not None:
                _accumulate(sums, logits.t(), hidden[rows])
        if target_grad is not None:
            columns = target.masked_fill((target < 0) | (target >= ctx.shard.width), -1)[:, None]
            hidden_sum += hidden_grad(target_grad[:, None], columns, weight)
            if sums is not None:
                add_weight_grad(sums, target_grad[:, None], columns, hidden)
        weight_part = sums.to(weight.dtype) if sums is not None and ctx.main_grad is None else None
        return hidden_sum, weight_part, None, None, None


def _accumulate(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """sums += left @ right. On a GPU the GEMM itself accumulates 16-bit factors into float32 sums."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    elif left.device.type == "cuda":
        torch.addmm(sums, left, right, out_dtype=sums.dtype, out=sums)
    else:
        sums.addmm_(left.to(sums.dtype), right.to(sums.dtype))
