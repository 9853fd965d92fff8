"""Causal attention of the last positions of a sequence: what a context-parallel rank computes for each chunk
it holds. There is no mask, and neither forward nor backward holds positions x positions."""

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_suffix(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """query [b, n, c, d] stands at the last c of the positions of key and value [b, g, s, d], n a multiple of
    g. Returns [b, n, c, d]. Saves its arguments, the result and a logsumexp per query."""
    if query.is_cuda:
        mask: Any = causal_lower_right(query.size(2), key.size(2))
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    output: Any = _Suffix.apply(query, key, value, scale)
    return output


class _Suffix(torch.autograd.Function):
    """Two parts, the keys before the first query and those from there on, joined by their logsumexps. Given
    the joined result and logsumexp, the backward of each part is its share of the whole (as in ring
    attention, arXiv:2310.01889)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts = [
            _forward(query, k, v, 0.0, causal, scale=scale) for k, v, causal in _parts(query, key, value)
        ]
        output, lse = parts[-1]
        if len(parts) == 2:
            earlier, earlier_lse = parts[0]
            lse = torch.logaddexp(lse, earlier_lse)
            weights = [(part_lse - lse).exp().unsqueeze(-1) for _, part_lse in parts]
            output = (weights[0] * earlier + weights[1] * output).to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, lse = ctx.saved_tensors
        parts = [
            _backward(grad, query, k, v, output, lse, 0.0, causal, scale=ctx.scale)
            for k, v, causal in _parts(query, key, value)
        ]
        queries, keys, values = zip(*parts)
        return reduce(torch.add, queries), torch.cat(keys, 2), torch.cat(values, 2), None


def _parts(query: Tensor, key: Tensor, value: Tensor) -> list[tuple[Tensor, Tensor, bool]]:
    """Keys, values, whether they are causal: those before the first query, if any; then the queries' own."""
    before = key.size(2) - query.size(2)
    own = (key[:, :, before:], value[:, :, before:], True)
    return [(key[:, :, :before], value[:, :, :before], False), own] if before else [own]
