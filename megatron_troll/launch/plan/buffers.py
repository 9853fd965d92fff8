"""Megatron's buffers of parameters and gradients: their lengths, and the part for which each data-parallel
rank keeps optimizer state (megatron-core 0.19.2, distributed/param_and_grad_buffer.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_troll.launch.plan.parameters import Parameter

PARAMETER_ALIGN, BUCKET_ALIGN = 64, 128
BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000
# A bucket of whole matrices grows until this share of ranks x its largest matrix is not padding.
FILLED = 0.9

Interval = tuple[int, int]


@dataclass(frozen=True)
class Buffer:
    """Layout of one buffer. numel: with padding; parameters, buckets: their intervals in it."""

    numel: int
    parameters: tuple[Interval, ...]
    buckets: tuple[Interval, ...]

    @property
    def used(self) -> int:
        return sum(end - start for start, end in self.parameters)

    def owned(self, rank: int, ranks: int) -> int:
        """Parameter elements in `rank`'s part of every bucket, each cut into `ranks` parts."""
        total = 0
        for start, end in self.buckets:
            size = (end - start) // ranks
            low, high = start + rank * size, start + (rank + 1) * size
            total += sum(max(0, min(high, last) - max(low, first)) for first, last in self.parameters)
        return total


def bucket_size(data_parallel: int) -> int:
    """Elements after which a bucket is closed, if gradients are reduced during the backward pass."""
    return max(BUCKET, BUCKET_PER_RANK * data_parallel)


def layout_of(parameters: Sequence[Parameter], ranks: int, sharded: bool, bucket: int | None) -> Buffer:
    """The buffer of trained `parameters`, in the order of the model, over `ranks` data-parallel ranks.
    `sharded`: for the distributed optimizer, the only case with padding; `bucket`: see bucket_size, None for
    a single bucket."""
    align = _aligned if sharded else (lambda n, _: n)
    whole = math.lcm(ranks, BUCKET_ALIGN)
    places: list[Interval] = []
    buckets: list[Interval] = []
    position = opened = 0

    def close(end: int) -> int:
        nonlocal opened
        buckets.append((opened, align(end, whole)))
        opened = buckets[-1][1]
        return opened

    for parameter in (p for p in reversed(parameters) if p.trained):
        alone = parameter.shared and sharded
        position = align(position, PARAMETER_ALIGN)
        if alone and position > opened:
            position = close(position)
        end = position + parameter.numel
        places.append((position, end))
        filled = bucket is not None and end - opened >= bucket
        position = close(end) if filled or alone else end
    if position > opened:
        close(position)
    return Buffer(opened, tuple(places), tuple(buckets))


def layout_of_matrices(parameters: Sequence[Parameter], ranks: int, bucket: int | None) -> Buffer:
    """The buffer of trained matrices whose state is sharded by whole matrices (megatron-core 0.19.2,
    optimizer/layer_wise_optimizer.py): a bucket is cut into equal parts, one per rank, and each matrix, the
    largest first, goes to the emptiest part."""
    places: list[Interval] = []
    buckets: list[Interval] = []
    position, chunk = 0, list[int]()
    sizes = [p.numel for p in reversed(parameters) if p.trained]
    for i, numel in enumerate(sizes):
        chunk.append(numel)
        least = None if bucket is None else max(bucket, int(ranks * max(chunk) * FILLED))
        if i + 1 < len(sizes) and (least is None or sum(chunk) < least):
            continue
        ends = [0] * ranks
        within: list[tuple[int, int, int]] = []
        for size in sorted(chunk, reverse=True):
            rank = ends.index(min(ends))
            start = _aligned(ends[rank], PARAMETER_ALIGN)
            within.append((rank, start, start + size))
            ends[rank] = start + size
        part = _aligned(max(ends), math.lcm(PARAMETER_ALIGN, math.lcm(ranks, BUCKET_ALIGN) // ranks))
        places += [(position + r * part + start, position + r * part + end) for r, start, end in within]
        buckets.append((position, position + ranks * part))
        position, chunk = buckets[-1][1], []
    return Buffer(position, tuple(places), tuple(buckets))


def _aligned(n: int, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple
