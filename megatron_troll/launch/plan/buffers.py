"""Megatron's buffers of parameters and gradients: how long they are, and which part each data-parallel rank
keeps optimizer state for (megatron-core 0.19.2, distributed/param_and_grad_buffer.py)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_troll.launch.plan.parameters import Parameter

PARAMETER_ALIGN, BUCKET_ALIGN = 64, 128
BUCKET, BUCKET_PER_RANK = 40_000_000, 1_000_000

Interval = tuple[int, int]


@dataclass(frozen=True)
class Buffer:
    """numel: with padding; parameters, buckets: where they lie in it."""

    numel: int
    parameters: tuple[Interval, ...]
    buckets: tuple[Interval, ...]

    @property
    def used(self) -> int:
        return sum(end - start for start, end in self.parameters)

    def owned(self, rank: int, ranks: int) -> int:
        """Numbers of parameters in the part of each bucket that is `rank`'s of `ranks`."""
        total = 0
        for start, end in self.buckets:
            size = (end - start) // ranks
            low, high = start + rank * size, start + (rank + 1) * size
            total += sum(max(0, min(high, last) - max(low, first)) for first, last in self.parameters)
        return total


def bucket_size(data_parallel: int) -> int:
    """Numbers after which a bucket is closed where gradients are reduced while the backward pass goes on."""
    return max(BUCKET, BUCKET_PER_RANK * data_parallel)


def layout_of(parameters: Sequence[Parameter], ranks: int, sharded: bool, bucket: int | None) -> Buffer:
    """The buffer of trained `parameters`, in the order of the model, over `ranks` data-parallel ranks.
    `sharded`: for the distributed optimizer, which alone pads; `bucket`: see bucket_size, None for one."""
    align = (lambda n, multiple: math.ceil(n / multiple) * multiple) if sharded else (lambda n, _: n)
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
