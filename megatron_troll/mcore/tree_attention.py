"""Attention over packed sequences that continue one another: a prefix that several share is held once.

A query sees its own sequence up to itself, and all of every sequence that its own continues. On CPU each of
these is a part of its own, computed by torch's flash attention; the parts are joined by their logsumexps (as
in ring attention, arXiv:2310.01889). On a GPU it is one mask of FlexAttention (arXiv:2412.05496), which has
no backward on CPU.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_troll.batching.plan import zigzag
from megatron_troll.parallel.groups import Group
from megatron_troll.types import PackedTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from megatron_troll.mcore.packing import SequenceBucket


@dataclass(frozen=True)
class AttentionPart:
    """Queries that see the same keys, or with `causal` each those up to itself, in a dense batch of B.

    query   [B, Lq] row of each query in this rank's flat [t] tokens
    key     [B, Lk] row of each key in the flat tokens of all context-parallel ranks; Lk = Lq if causal
    used    [B, Lq] bool, False on the padding of a shorter sequence; None: there is none
    """

    query: Tensor
    key: Tensor
    causal: bool
    used: Tensor | None = None


def parts_of(
    tree: PackedTree,
    starts: Sequence[int],
    keys: Sequence[Tensor],
    buckets: Sequence["SequenceBucket"],
    cp: Group,
) -> list[AttentionPart]:
    """The parts of packed sequences at `starts` [S + 1], counted over all context-parallel ranks; keys[i]:
    row of each position of sequence i in the flat tokens of all of them. `buckets`: the sequences, each
    apart."""
    ends = _ends(tree)
    parts = []
    for i, length in enumerate(tree.length):
        below = slice(starts[i + 1] // cp.size, starts[ends[i]] // cp.size)
        if length and below.stop > below.start:
            queries = torch.arange(below.start, below.stop)[None]
            parts.append(AttentionPart(queries, keys[i][None, :length], False))
    return parts + [part for bucket in buckets for part in _own(bucket, cp)]


def _ends(tree: PackedTree) -> list[int]:
    """Return for each sequence the index after the last that continues it."""
    ends = list(range(1, len(tree.parent) + 1))
    for i, parent in reversed(list(enumerate(tree.parent))):
        if parent != -1:
            ends[parent] = max(ends[parent], ends[i])
    return ends


def _own(bucket: "SequenceBucket", cp: Group) -> Iterator[AttentionPart]:
    """Parts in which queries see their own sequences. Under context parallelism a rank holds two chunks of
    each: each of them sees itself and what is before it."""
    if cp.size == 1:
        yield AttentionPart(bucket.query, bucket.key, True, None if bucket.used.all() else bucket.used)
        return
    for chunk, at in zip(bucket.query.chunk(2, 1), zigzag(bucket.key.shape[1], cp.size, cp.rank).chunk(2)):
        first, last = int(at[0]), int(at[-1]) + 1
        yield AttentionPart(chunk, bucket.key[:, first:last], True)
        if first:
            yield AttentionPart(chunk, bucket.key[:, :first], False)


def last_readers(tree: PackedTree, starts: Sequence[int]) -> Tensor:
    """[t] for each row the row after the last that sees it: the end of the sequences that continue its own
    or, for padding, of its own. Without context parallelism."""
    until = torch.zeros(starts[-1], dtype=torch.int32)
    for i, (end, length) in enumerate(zip(_ends(tree), tree.length)):
        until[starts[i] : starts[i] + length] = starts[end]
        until[starts[i] + length : starts[i + 1]] = starts[i + 1]
    return until


def attend(query: Tensor, key: Tensor, value: Tensor, parts: Sequence[AttentionPart], scale: float) -> Tensor:
    """Attention of query [t, n, d] to key and value [T, g, d] (n is a multiple of g) by all `parts`; 0 where
    a query is in none. Returns [t, n, d]. Saves its arguments, the result and a logsumexp per query and head;
    holds no queries x keys."""
    output: Any = _Parts.apply(query, key, value, parts, scale)
    return output


def attend_masked(query: Tensor, key: Tensor, value: Tensor, mask: "BlockMask", scale: float) -> Tensor:
    """Compute the same on a GPU for query [t, n, d], key and value [t, g, d]; `mask` is from `block_mask`."""
    flex = _flex_attention(query.is_cuda)
    rows = [tensor.transpose(0, 1)[None] for tensor in (query, key, value)]
    gqa = query.size(1) != key.size(1)
    return flex(*rows, block_mask=mask, scale=scale, enable_gqa=gqa)[0].transpose(0, 1)


def block_mask(until: Tensor) -> "BlockMask":
    """The mask of all layers, from `last_readers` [t]: a row sees those at or before it that it is before the
    end of. Holds a number for each block of 128 x 128."""

    from torch.nn.attention.flex_attention import create_block_mask  # seconds of importing, for a GPU alone

    def seen(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < until[key])

    size = len(until)
    return create_block_mask(seen, None, None, size, size, device=str(until.device))


@functools.cache
def _flex_attention(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention


_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Parts(torch.autograd.Function):
    """Given the joined result and logsumexp, the backward of each part gives its share of the gradients."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, parts: Sequence[AttentionPart], scale: float
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        output = torch.zeros_like(query, dtype=wide)
        lse = query.new_full(query.shape[:2], -torch.inf, dtype=wide)
        for part in parts:
            rows = (_rows(query, part.query), _rows(key, part.key), _rows(value, part.key))
            found, found_lse = _forward(*rows, 0.0, part.causal, scale=scale)
            _join(output, lse, part, found.transpose(1, 2), found_lse.transpose(1, 2))
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.parts, ctx.scale = parts, scale
        return output

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, output, lse = ctx.saved_tensors
        sums = [torch.zeros_like(tensor) for tensor in (query, key, value)]
        for part in ctx.parts:
            rows = (_rows(query, part.query), _rows(key, part.key), _rows(value, part.key))
            grad, found = (_rows(tensor, part.query) for tensor in (upstream, output))
            found_lse = lse[part.query].transpose(1, 2)
            if part.used is not None:
                # exp(score - inf) = 0: the padding has no part in any gradient.
                found_lse = found_lse.masked_fill(~part.used[:, None], torch.inf)
            given = (found, found_lse.contiguous(), 0.0, part.causal)
            grads = _backward(grad, *rows, *given, scale=ctx.scale)
            for total, index, found in zip(sums, (part.query, part.key, part.key), grads):
                total.index_add_(0, index.flatten(), found.transpose(1, 2).flatten(0, 1))
        return *sums, None, None


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """[t, n, d] at index [B, L] -> [B, n, L, d]."""
    return tensor[index].transpose(1, 2)


def _join(output: Tensor, lse: Tensor, part: AttentionPart, found: Tensor, found_lse: Tensor) -> None:
    """Join a part's result [B, Lq, n, d] and logsumexp [B, Lq, n] to those of the parts before."""
    used = slice(None) if part.used is None else part.used
    at = part.query[used].flatten()
    found, found_lse = found[used].flatten(0, -3), found_lse[used].flatten(0, -2)
    both = torch.logaddexp(lse[at], found_lse)
    output[at] = output[at] * (lse[at] - both).exp()[..., None] + found * (found_lse - both).exp()[..., None]
    lse[at] = both
