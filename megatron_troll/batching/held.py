"""Micro-batches that wait in host memory, in narrow types, until one is used on the device."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor

from megatron_troll.types import MicroBatch, TopK

# Bytes of a micro-batch that waits: per token; in addition per token with loss; per entry of the top-K.
WAITING_TOKEN_BYTES, WAITING_LOSS_TOKEN_BYTES, WAITING_ENTRY_BYTES = 13, 36, 8
# Fields that a micro-batch in use has as int64.
INDICES = ("tokens", "positions", "index", "target", "sequence", "position")


@dataclass
class _InUse:
    """The micro-batch that is on the device, and the one in host memory that it was made of."""

    held: MicroBatch | None = None
    there: MicroBatch | None = None


@dataclass(frozen=True)
class HeldBatches(Sequence[MicroBatch]):
    """Micro-batches, of which only the one that was asked for last is on `device`, in its own types: 13 bytes
    a token of the others, 36 in addition for one with loss, and 8 an entry of the engine's top-K. Slices and
    joined sequences share the one in use."""

    held: tuple[MicroBatch, ...]
    device: torch.device
    _used: _InUse = field(default_factory=_InUse, repr=False, compare=False)

    @classmethod
    def of(cls, batches: Iterable[MicroBatch], device: torch.device) -> "HeldBatches":
        """Micro-batches as `build` makes them, one at a time."""
        return cls(tuple(map(_narrow, batches)), device)

    def __len__(self) -> int:
        return len(self.held)

    @overload
    def __getitem__(self, at: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, at: slice) -> "HeldBatches": ...
    def __getitem__(self, at: int | slice) -> "MicroBatch | HeldBatches":
        if isinstance(at, slice):
            return replace(self, held=self.held[at])
        held, used = self.held[at], self._used
        if used.held is not held or used.there is None:
            # Never two at once.
            used.there = None
            used.held, used.there = held, _wide(held.to(self.device))
        return used.there


def at_rest(batches: Sequence[MicroBatch]) -> Sequence[MicroBatch]:
    """The micro-batches where and as they are held, to read their sizes."""
    return batches.held if isinstance(batches, HeldBatches) else batches


def with_experts(
    batches: Sequence[MicroBatch], experts: Sequence[Mapping[int, Tensor] | None]
) -> Sequence[MicroBatch]:
    """The same micro-batches with `experts` (`MicroBatch.experts`), one mapping each."""
    given = [replace(batch, experts=each) for batch, each in zip(at_rest(batches), experts, strict=True)]
    return replace(batches, held=tuple(given)) if isinstance(batches, HeldBatches) else given


def joined(parts: Sequence[HeldBatches]) -> Sequence[MicroBatch]:
    """The micro-batches of parts that were cut together, one after the other."""
    return replace(parts[0], held=tuple(batch for part in parts for batch in part.held)) if parts else ()


def cut(whole: HeldBatches, sizes: Sequence[int]) -> list[HeldBatches]:
    """Consecutive parts of these sizes."""
    parts, start = [], 0
    for size in sizes:
        parts.append(whole[start : start + size])
        start += size
    return parts


def _narrow(batch: MicroBatch) -> MicroBatch:
    """Hold the indices of what `build` has made in 32 bits. An engine's record has an lse of 0."""
    topk = batch.rollout_topk
    if topk is not None:
        topk = replace(topk, ids=topk.ids.int(), count=topk.count.int(), place=topk.place.int(), lse=None)
    return replace(batch, rollout_topk=topk, **{name: getattr(batch, name).int() for name in INDICES})


def _wide(batch: MicroBatch) -> MicroBatch:
    """The inverse of `_narrow`."""
    topk = batch.rollout_topk
    if topk is not None:
        zeros = torch.zeros(len(topk.ids), dtype=torch.float64, device=topk.ids.device)
        topk = TopK(topk.ids.long(), topk.logits, topk.count.long(), topk.place.long(), zeros, topk.vocab)
    return replace(batch, rollout_topk=topk, **{name: getattr(batch, name).long() for name in INDICES})
