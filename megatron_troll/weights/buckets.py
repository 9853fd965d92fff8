"""A stream of tensors as a few large byte tensors, with bounded memory."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """One tensor of a bucket: bytes [start, end) of its `flat`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    end: int


@dataclass(frozen=True)
class TensorBucket:
    """Tensors of one dtype, end to end without gaps: flat uint8 [bytes]."""

    pieces: tuple[Piece, ...]
    flat: Tensor


# What is left of two buckets holds the tensor that is copied into one of them.
FILLED = 7 / 8

Allocate = Callable[[int, torch.device], Tensor]


def allocated(size: int, device: torch.device) -> Tensor:
    """Uninitialized memory, [size] uint8."""
    return torch.empty(size, dtype=torch.uint8, device=device)


def buckets(
    tensors: Iterable[tuple[str, Tensor]], max_bytes: int, allocate: Allocate = allocated
) -> Iterator[TensorBucket]:
    """Copy `tensors` into buckets of at most FILLED of `max_bytes` (a larger tensor has a bucket of its own),
    on their device, in memory from `allocate`.

    The memory of a bucket is reused for the one after the next: finish reading a bucket before you ask for
    that one. Two buckets and the tensor in hand, if that is at most a quarter of `max_bytes`, are
    2 x `max_bytes`.
    """
    memory = _Memory(int(max_bytes * FILLED), allocate)
    pieces: list[Piece] = []
    flat: Tensor | None = None
    for name, tensor in tensors:
        start = pieces[-1].end if pieces else 0
        fits = flat is not None and start + tensor.nbytes <= flat.numel()
        if pieces and not (fits and tensor.dtype == pieces[0].dtype):
            assert flat is not None
            yield TensorBucket(tuple(pieces), flat[:start])
            pieces, start, flat = [], 0, None
        if flat is None:
            flat = memory.take(tensor)
        end = start + tensor.nbytes
        flat[start:end].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        pieces.append(Piece(name, tuple(tensor.shape), tensor.dtype, start, end))
        # Or it would still be held while the next is made.
        del tensor
    if pieces:
        assert flat is not None
        yield TensorBucket(tuple(pieces), flat[: pieces[-1].end])


class _Memory:
    """Two alternating buffers of `size` bytes; a buffer for a larger tensor is not kept."""

    def __init__(self, size: int, allocate: Allocate) -> None:
        self._size = size
        self._allocate = allocate
        self._buffers: list[Tensor | None] = [None, None]
        self._turn = 0

    def take(self, first: Tensor) -> Tensor:
        """The next buffer, large enough for `first`."""
        self._turn = 1 - self._turn
        size = max(self._size, math.prod(first.shape) * first.itemsize)
        buffer = self._buffers[self._turn]
        if buffer is None or buffer.numel() < size:
            self._buffers[self._turn] = None
            buffer = self._allocate(size, first.device)
            self._buffers[self._turn] = buffer if size == self._size else None
        return buffer
