"""Safetensors files: strict checks of the header, reads of one tensor at a time, and streamed writes.

The safetensors library maps whole files into memory, which counts as this process's memory once it is read,
and writes a file only when all of its tensors are in memory. The format
(https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header, the tensors
end to end.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_troll.config import ConfigError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PREFIX_BYTES = 8
BEGINNING_BYTES = 64
AHEAD_BYTES = 2**24
LARGEST_HEADER_BYTES = 10**8  # the limit of the safetensors library
# First bytes of other files that are found under the name of a safetensors file.
OTHERS = {
    b"PK": "a pickled PyTorch file; save it as safetensors first (transformers: save_pretrained)",
    b"\x80": "a pickle; save it as safetensors first (transformers: save_pretrained)",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    b"<": "a web page; download the file again",
}


class TensorFileError(ConfigError):
    """A file is not a safetensors file, or has the wrong size."""


class _UnknownDtypeError(TensorFileError):
    """A whole file holds numbers of a dtype that is not read."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, whose bytes begin at `start`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.dtype, self.shape)


def nbytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * dtype.itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Every tensor of a file by name. Raises TensorFileError if it is not safetensors, has a wrong size, or
    describes a tensor that cannot be read; the message names that tensor."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(BEGINNING_BYTES)
        if len(beginning) > PREFIX_BYTES and beginning[PREFIX_BYTES:][:1] != b"{":
            raise TensorFileError(f"{path} is {_what_it_is(beginning)}")
        length = int.from_bytes(beginning[:PREFIX_BYTES], "little")
        if PREFIX_BYTES + length > size or size <= PREFIX_BYTES:
            raise TensorFileError(f"{path} is cut short: {size} bytes do not hold its header")
        if length > LARGEST_HEADER_BYTES:
            raise TensorFileError(
                f"{path} is not a safetensors file: a header of {length} bytes, at most "
                f"{LARGEST_HEADER_BYTES} are allowed"
            )
        file.seek(PREFIX_BYTES)
        header = file.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_without_duplicates)
        tensors = {name: _stored(name, entry) for name, entry in entries.items() if name != "__metadata__"}
        end = _check_order(tensors)
    except _UnknownDtypeError as error:
        raise TensorFileError(f"{path}: {error}") from error
    except TensorFileError as error:
        raise TensorFileError(f"{path}: {error}; download or write the file again") from error
    except (ValueError, RecursionError) as error:
        raise TensorFileError(f"{path} is not a safetensors file: its header cannot be read") from error
    base = PREFIX_BYTES + length
    if base + end != size:
        state = "is cut short" if size < base + end else "is longer than its header says"
        raise TensorFileError(f"{path} {state}: {size} bytes, {base + end} expected")
    return {name: replace(tensor, start=base + tensor.start) for name, tensor in tensors.items()}


def _what_it_is(beginning: bytes) -> str:
    found = (what for start, what in OTHERS.items() if beginning.startswith(start))
    return next(found, "not a safetensors file")


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise TensorFileError(f"its header names {twice!a} twice")
    return entries


def _stored(name: str, entry: Any) -> Stored:
    """The tensor that an entry of a header describes, with its start counted from the end of the header."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            if dtype not in DTYPES:
                raise _UnknownDtypeError(
                    f"{name!a} has dtype {dtype[:20]!a}, which is not supported: use the folder of bf16 or "
                    "fp32 weights that it was made from"
                )
            if not all(type(length) is int and length >= 0 for length in shape):
                raise TensorFileError(f"{name!a} has shape {str(shape)[:80]}")
            stored = Stored(DTYPES[dtype], tuple(shape), begin)
            if begin < 0 or stored.nbytes != end - begin:
                raise TensorFileError(
                    f"{name!a}, {dtype} {tuple(shape)} of {stored.nbytes} bytes, is said to be at bytes "
                    f"{begin} to {end}"
                )
            return stored
    raise TensorFileError(f"its header describes {name!a} without dtype, shape and data_offsets")


def _check_order(tensors: Mapping[str, Stored]) -> int:
    """Check that the tensors are end to end, as the format requires; return where they end."""
    end, before = 0, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if tensor.start != end:
            what = "overlaps" if tensor.start < end else "leaves a gap after"
            raise TensorFileError(f"{name!a}, which begins at byte {tensor.start}, {what} {before}")
        end, before = end + tensor.nbytes, f"{name!a}, which ends at {end + tensor.nbytes}"
    return end


def read_tensor(file: int, stored: Stored, index: int | None = None) -> Tensor:
    """Read a tensor of the open file (a descriptor), or its `index`-th row along the first axis, into new
    memory."""
    shape, start = stored.shape, stored.start
    if index is not None:
        shape = shape[1:]
        start += index * nbytes(stored.dtype, shape)
    tensor = torch.empty(shape, dtype=stored.dtype)
    read_into(file, tensor, start)
    return tensor


def read_into(file: int, tensor: Tensor, start: int) -> None:
    """Fill a contiguous tensor with the bytes of the open file from `start`."""
    view = as_bytes(tensor)
    expect(file, start, len(view))
    done = 0
    while done < len(view):
        # One call reads at most 2 GiB.
        count = os.preadv(file, [view[done:]], start + done)
        if count == 0:
            raise OSError(f"the file ended {len(view) - done} bytes early: it was changed while it was read")
        done += count


def expect(file: int, start: int, count: int) -> None:
    """Ask the system to prefetch these bytes of the open file and AHEAD_BYTES after them."""
    os.posix_fadvise(file, start, count + AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the host."""
    array: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class TensorFileWriter:
    """Writes a safetensors file into `file` tensor by tensor, in the order of `layout`. Tensors with larger
    elements must come first, because readers need every tensor aligned."""

    def __init__(self, file: BinaryIO, layout: Layout) -> None:
        self._file = file
        self._left = iter(layout.items())
        self._unfinished: tuple[str, torch.dtype, int] = ("", torch.uint8, 0)
        sizes = [dtype.itemsize for dtype, _ in layout.values()]
        assert sizes == sorted(sizes, reverse=True), "order the tensors by the size of their elements"
        file.write(_header(layout))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the layout."""
        assert not self._unfinished[2], self._unfinished
        expected = next(self._left)
        assert (name, (tensor.dtype, tuple(tensor.shape))) == expected, (name, tensor.shape, expected)
        self._file.write(as_bytes(tensor.cpu().contiguous()))

    def write_piece(self, name: str, tensor: Tensor) -> None:
        """Write the next piece of the next tensor of the layout, in the order of its memory."""
        if not self._unfinished[2]:
            expected, (dtype, shape) = next(self._left)
            self._unfinished = (expected, dtype, nbytes(dtype, shape))
        expected, dtype, left = self._unfinished
        assert (name, tensor.dtype) == (expected, dtype), (name, tensor.dtype, expected, dtype)
        assert tensor.nbytes <= left, (name, tensor.shape, left)
        self._file.write(as_bytes(tensor.cpu().contiguous()))
        self._unfinished = (name, dtype, left - tensor.nbytes)


def _header(layout: Layout) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in layout.items():
        end = start + nbytes(dtype, shape)
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text
