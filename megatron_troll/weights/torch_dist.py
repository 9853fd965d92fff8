"""Read and write the tensors of Megatron's distributed checkpoints (torch_dist) one by one, without Megatron.

A folder holds `.metadata`, a pickle with the location of each chunk of each tensor; files in which every
chunk has the format of torch.save; and two small files that Megatron requires. The pickle is checked before
it is loaded (mcore/checkpoint_pickle.py), and chunks are read with weights_only: no code of a checkpoint is
run.
"""

import io
import json
import os
import pickle
import zipfile
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_troll.config import ConfigError
from megatron_troll.mcore.checkpoint_folder import BACKENDS, CheckpointError
from megatron_troll.mcore.checkpoint_pickle import COMMON, METADATA, read_index
from megatron_troll.weights.megatron_keys import Region, Size
from megatron_troll.weights.tensor_file import expect, read_into
from megatron_troll.weights.values import check_values

WRITTEN_BY = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


class TensorsError(ConfigError):
    """The tensors of a checkpoint cannot be read."""


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor, and the bytes of a file that hold it."""

    start: Size
    shape: Size
    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class SavedTensor:
    """One tensor of a checkpoint; its chunks are ordered by their first index."""

    dtype: torch.dtype
    shape: Size
    chunks: tuple[Chunk, ...]

    def overlapping(self, region: Region) -> Iterable[Chunk]:
        """The chunks that overlap `region`."""
        if not region.shape:
            return self.chunks
        first, end = region.start[0], region.start[0] + region.shape[0]
        low, high = (bisect_left(self._firsts, at) for at in (first - self._longest + 1, end))
        return [chunk for chunk in self.chunks[low:high] if all(_overlap(chunk, region))]

    @cached_property
    def _firsts(self) -> list[int]:
        return [chunk.start[0] for chunk in self.chunks]

    @cached_property
    def _longest(self) -> int:
        return max((chunk.shape[0] for chunk in self.chunks), default=0)


def _overlap(chunk: Chunk, region: Region) -> list[int]:
    """Length of the part of `region` that the chunk holds, along each axis."""
    axes = zip(chunk.start, chunk.shape, region.start, region.shape, strict=True)
    return [max(0, min(a + n, b + m) - max(a, b)) for a, n, b, m in axes]


class SavedTensors:
    """The tensors of a checkpoint folder by key; one chunk at a time is read into memory.

    Raises TensorsError if `.metadata` cannot be read or does not describe tensors, or if files are missing or
    cut short or tensors lack chunks; the error names all of these.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._opened: tuple[str, BinaryIO | None] = ("", None)
        self.tensors: Mapping[str, SavedTensor] = dict(sorted(_read_metadata(folder / METADATA).items()))
        if problems := [*self._files_cut_short(), *self._incomplete()]:
            raise TensorsError("\n".join(problems))

    @property
    def files(self) -> list[Path]:
        """The index and the files that hold the tensors."""
        names = {chunk.file for saved in self.tensors.values() for chunk in saved.chunks}
        return [self.folder / name for name in (METADATA, *sorted(names))]

    def read(self, region: Region) -> Tensor:
        """Read a region of a tensor into new memory. Raises ConfigError if its values cannot be weights."""
        saved = self.tensors[region.key]
        chunks = list(saved.overlapping(region))
        whole = self._assembled(saved, region, chunks)
        check_values(whole, region.key, self.folder / chunks[0].file if chunks else self.folder)
        return whole

    def _assembled(self, saved: SavedTensor, region: Region, chunks: list[Chunk]) -> Tensor:
        if len(chunks) == 1 and (chunks[0].start, chunks[0].shape) == (region.start, region.shape):
            return self._load(chunks[0])
        whole = torch.empty(region.shape, dtype=saved.dtype)
        for chunk in chunks:
            starts = [max(a, b) for a, b in zip(chunk.start, region.start)]
            sizes = _overlap(chunk, region)
            held = _block(self._load(chunk), starts, chunk.start, sizes)
            _block(whole, starts, region.start, sizes).copy_(held)
        return whole

    def _load(self, chunk: Chunk) -> Tensor:
        file = self._open(chunk.file)
        expect(file.fileno(), chunk.offset, chunk.length)
        section: Any = Section(file.fileno(), chunk.offset, chunk.length)
        try:
            with torch.serialization.skip_data():
                tensor = torch.load(section, map_location="cpu", weights_only=True)
            # torch's own reader would verify checksums, at a tenth of the speed.
            storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
            read_into(file.fileno(), storage, chunk.offset + _data_start(section))
        except pickle.UnpicklingError as error:
            # Replaces torch's message, which advises to run the code in the file.
            raise self._damaged(chunk, "it does not hold a tensor that torch.save wrote") from error
        except (RuntimeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise self._damaged(chunk, str(error)) from error
        if tuple(tensor.shape) != chunk.shape:
            raise self._damaged(chunk, f"a tensor of {tuple(tensor.shape)}, {METADATA} says {chunk.shape}")
        return tensor

    def _damaged(self, chunk: Chunk, why: str) -> TensorsError:
        return TensorsError(f"{self.folder / chunk.file} is damaged at byte {chunk.offset}: {why}")

    def _open(self, name: str) -> BinaryIO:
        """Open a file and keep it open until another one is opened."""
        if self._opened[1] is None or self._opened[0] != name:
            self._opened = (name, open(self.folder / name, "rb", buffering=0))  # noqa: SIM115 - kept open
        assert self._opened[1] is not None
        return self._opened[1]

    def _files_cut_short(self) -> Iterable[str]:
        ends: dict[str, int] = defaultdict(int)
        for saved in self.tensors.values():
            for chunk in saved.chunks:
                ends[chunk.file] = max(ends[chunk.file], chunk.offset + chunk.length)
        for name, end in sorted(ends.items()):
            path = self.folder / name
            if not path.is_file():
                yield f"missing: {path}"
            elif path.stat().st_size < end:
                yield f"cut short: {path}, {path.stat().st_size} bytes of at least {end}"

    def _incomplete(self) -> Iterable[str]:
        for key, saved in self.tensors.items():
            held = sum(prod(chunk.shape) for chunk in saved.chunks)
            if held != (whole := prod(saved.shape)):
                yield f"incomplete: {key} {saved.shape}: its chunks hold {held} of {whole} elements"


def _block(tensor: Tensor, starts: list[int], origin: Size, sizes: list[int]) -> Tensor:
    return tensor[tuple(slice(a - o, a - o + n) for a, o, n in zip(starts, origin, sizes))]


class Section(io.RawIOBase):
    """Bytes `start` to `start + length` of an open file, as a file."""

    def __init__(self, file: int, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(0, self._length - self._at)]
        count = os.preadv(self._file, [view], self._start + self._at)
        self._at += count
        return count


def _data_start(section: Section) -> int:
    """Offset of a tensor's storage in the output of torch.save, which is an uncompressed zip archive."""
    with zipfile.ZipFile(section) as archive:
        (record,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
    section.seek(record.header_offset + 26)
    name, extra = (int.from_bytes(section.read(2) or b"", "little") for _ in range(2))
    return record.header_offset + 30 + name + extra


def _read_metadata(path: Path) -> dict[str, SavedTensor]:
    try:
        metadata = read_index(path)
        return {
            key: _saved(key, entry, metadata.storage_data)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except CheckpointError as error:
        raise TensorsError(str(error)) from error
    except KeyError as error:
        raise TensorsError(f"{path} has no location for {error}: the checkpoint is damaged") from error


def _saved(
    key: str, entry: TensorStorageMetadata, storage: Mapping[MetadataIndex, _StorageInfo]
) -> SavedTensor:
    chunks = []
    for chunk in entry.chunks:
        info = storage[MetadataIndex(key, chunk.offsets)]
        where = (info.relative_path, info.offset, info.length)
        chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), *where))
    chunks.sort(key=lambda chunk: chunk.start)
    return SavedTensor(entry.properties.dtype, tuple(entry.size), tuple(chunks))


def write_chunk(file: BinaryIO, tensor: Tensor) -> tuple[int, int]:
    """Append a tensor to a file of a checkpoint; return the offset and the number of its bytes."""
    if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
        # torch.save would write the whole storage of a view.
        tensor = tensor.clone(memory_format=torch.contiguous_format)
    offset = file.tell()
    torch.save(tensor, file)
    return offset, file.tell() - offset


def write_index(folder: Path, tensors: Mapping[str, SavedTensor]) -> None:
    """Write the index and the small files; with the files of chunks of `tensors` they form a checkpoint."""
    storage = {
        MetadataIndex(key, chunk.start): _StorageInfo(chunk.file, chunk.offset, chunk.length)
        for key, saved in tensors.items()
        for chunk in saved.chunks
    }
    described: dict[str, Any] = {
        key: TensorStorageMetadata(
            TensorProperties(dtype=saved.dtype),
            torch.Size(saved.shape),
            [
                ChunkStorageMetadata(torch.Size(chunk.start), torch.Size(chunk.shape))
                for chunk in saved.chunks
            ],
        )
        for key, saved in tensors.items()
    }
    with open(folder / METADATA, "wb") as file:
        pickle.dump(Metadata(state_dict_metadata=described, storage_data=storage), file)
    torch.save({}, folder / COMMON)
    (folder / BACKENDS).write_text(json.dumps(WRITTEN_BY))
