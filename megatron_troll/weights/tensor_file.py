"""Safetensors files: strict checks of the header, reads of one tensor at a time, and streamed writes.

The safetensors library maps whole files into memory, which counts as this process's memory once it is read,
and writes a file only when all of its tensors are in memory. The format
(https://huggingface.co/docs/safetensors): 8 bytes with the length of a JSON header, the header, the tensors
end to end.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PREFIX_BYTES = 8
BEGINNING_BYTES = 64
AHEAD_BYTES = 2**24
# First bytes of other files that are found under the name of a safetensors file.
OTHERS = {
    b"PK": "a pickled PyTorch file; save it as safetensors first (transformers: save_pretrained)",
    b"\x80": "a pickle; save it as safetensors first (transformers: save_pretrained)",
    b"version https://git-lfs": "a git-lfs pointer; fetch the file itself with `git lfs pull`",
    b"<": "a web page; download the file again",
}


class TensorFileError(ValueError):
    """A file is not a safetensors file, or has the wrong size."""


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
    """Every tensor of a file by name. Raises TensorFileError if it is not safetensors or has a wrong size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        beginning = file.read(BEGINNING_BYTES)
        if len(beginning) > PREFIX_BYTES and beginning[PREFIX_BYTES:][:1] != b"{":
            raise TensorFileError(f"{path} is {_what_it_is(beginning)}")
        length = int.from_bytes(beginning[:PREFIX_BYTES], "little")
        if PREFIX_BYTES + length > size or size <= PREFIX_BYTES:
            raise TensorFileError(f"{path} is cut short: {size} bytes do not hold its header")
        file.seek(PREFIX_BYTES)
        header = file.read(length)
    try:
        tensors = _parse(json.loads(header), PREFIX_BYTES + length)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TensorFileError(f"{path} is not a safetensors file: its header cannot be read") from error
    end = max((tensor.start + tensor.nbytes for tensor in tensors.values()), default=PREFIX_BYTES + length)
    if end != size:
        state = "is cut short" if size < end else "is longer than its header says"
        raise TensorFileError(f"{path} {state}: {size} bytes, {end} expected")
    return tensors


def _what_it_is(beginning: bytes) -> str:
    found = (what for start, what in OTHERS.items() if beginning.startswith(start))
    return next(found, "not a safetensors file")


def _parse(header: dict[str, Any], base: int) -> dict[str, Stored]:
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        tensor = Stored(DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), base + begin)
        if tensor.nbytes != end - begin:
            raise ValueError(name)
        tensors[name] = tensor
    return tensors


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
        sizes = [dtype.itemsize for dtype, _ in layout.values()]
        assert sizes == sorted(sizes, reverse=True), "order the tensors by the size of their elements"
        file.write(_header(layout))

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor of the layout."""
        expected = next(self._left)
        assert (name, (tensor.dtype, tuple(tensor.shape))) == expected, (name, tensor.shape, expected)
        self._file.write(as_bytes(tensor.cpu().contiguous()))


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
