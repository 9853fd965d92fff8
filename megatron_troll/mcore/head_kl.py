"""KL(policy || reference) over the whole vocabulary, from the hidden states of both."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from troll_kernels.head.shard import grad_sums

from megatron_troll.mcore.head_shard import HeadShard


def full_kl(
    head: HeadShard, hidden: Tensor, lse: Tensor, frozen: HeadShard, at: Tensor, q_lse: Tensor
) -> Tensor:
    """KL(p || q) [N] in nats: p = exp(logit - lse) of `head` at hidden states `hidden` [N, h], q of `frozen`
    at its own hidden states `at` [N, h'], with logsumexp q_lse [N]; both logsumexps in float64.
    Differentiable in p.

    dKL/dlogit_v = p_v (log p_v - log q_v - KL). Forward and backward hold a few chunks of logits; backward
    recomputes them. All-reduces N numbers.
    """
    result = _FullKl.apply(hidden, head.weight, lse.detach(), head, frozen, at.detach(), q_lse.detach())
    assert isinstance(result, Tensor)
    return result


class _FullKl(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        lse: Tensor,
        head: HeadShard,
        frozen: HeadShard,
        at: Tensor,
        q_lse: Tensor,
    ) -> Tensor:
        ctx.head, ctx.frozen = head, frozen
        total = torch.zeros_like(lse, dtype=torch.promote_types(head.weight.dtype, torch.float32))
        for rows, _, p, log_ratio in _chunks(head, hidden, lse, frozen, at, q_lse):
            total[rows] = (p * log_ratio).sum(1)
        head.tp.all_reduce(total)
        ctx.save_for_backward(hidden, lse, at, q_lse, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, lse, at, q_lse, total = ctx.saved_tensors
        head: HeadShard = ctx.head
        sums = grad_sums(head.weight, head.main_grad)
        hidden_part = torch.empty_like(hidden)
        for rows, logits, p, log_ratio in _chunks(head, hidden, lse, ctx.frozen, at, q_lse):
            grad = p * (log_ratio - total[rows, None]) * upstream[rows, None] * head.transform.slope(logits)
            grad = grad.to(hidden.dtype)
            hidden_part[rows] = grad @ head.weight[: head.shard.width]
            sums[: head.shard.width] += (grad.t() @ hidden[rows]).to(sums.dtype)
        weight_part = None if head.main_grad is not None else sums.to(head.weight.dtype)
        return hidden_part, weight_part, None, None, None, None, None


def _chunks(
    head: HeadShard, hidden: Tensor, lse: Tensor, frozen: HeadShard, at: Tensor, q_lse: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield (rows, logits, p, log p - log q) per chunk, tensors [c, width]; log p - log q is 0 if p is 0."""
    for start in range(0, len(hidden), head.shard.chunk):
        rows = slice(start, start + head.shard.chunk)
        logits, other = _logits(head, hidden[rows]), _logits(frozen, at[rows])
        p = (logits - lse[rows, None].to(logits.dtype)).exp()
        shift = (lse[rows, None] - q_lse[rows, None]).to(logits.dtype)
        yield rows, logits, p, torch.where(p > 0, logits - other - shift, 0.0)


def _logits(head: HeadShard, hidden: Tensor) -> Tensor:
    weight = head.weight[: head.shard.width]
    raw = (hidden.to(weight.dtype) @ weight.t()).to(torch.promote_types(weight.dtype, torch.float32))
    return head.transform.apply(raw)
