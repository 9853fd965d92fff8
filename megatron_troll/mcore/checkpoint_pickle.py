"""Check the pickles of a checkpoint before Megatron and torch unpickle them.

These are `.metadata`, the index of where each chunk of each tensor is stored, and the objects that torch.save
wrote beside the tensors: the common state (before Megatron-Core 0.19 a separate file, `common.pt`) and
Transformer Engine's `_extra_state`. torch reads the tensors themselves with weights_only.

A pickle is a program: it names functions and classes and calls them. Here the standard unpickler runs it
first with stand-ins that do nothing in place of the names that it may use; any other name is an error. This
module uses torch, not Megatron.
"""

import io
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_troll.mcore.checkpoint_folder import CheckpointError

METADATA = ".metadata"
COMMON, COMMON_OBJECT = "common.pt", "common_state/shard_0_1"
# Errors of such a run on a damaged or malformed pickle, and of torch's archive reader.
DAMAGE = (
    pickle.UnpicklingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
ADVICE = "Nothing of it was run. Restore the file from where it was written, or use another checkpoint"


class _Shared(type):
    """Metaclass of the stand-ins. The real classes are shared by the whole process: a pickle may make
    instances of them, but not set their attributes, which the unpickler would do without naming anything."""

    @property
    def __setstate__(cls) -> Any:
        raise pickle.UnpicklingError("it changes a class or function")


class _Record(metaclass=_Shared):
    """Stand-in for a class whose every instance is new, or for a function that returns new instances."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


class _Constant(_Record):
    """Stand-in for a class or function whose instances are shared with others, or need no state set."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it changes a constant")


# Keys are module and full name: a dotted name that reaches into one of these does not match. Values are
# called with the arguments that the real objects would get.
INDEX_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("pathlib", "PosixPath"): _Constant,
    ("torch", "Size"): _Constant,
    ("torch.serialization", "_get_layout"): _Constant,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Record,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): _Record,
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): _Record,
    ("torch.distributed.checkpoint.metadata", "Metadata"): _Record,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _Record,
    ("torch.distributed.checkpoint.metadata", "StorageMeta"): _Record,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): _Record,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _Record,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): _Constant,
    ("torch.distributed.checkpoint.planner", "SavePlan"): _Record,
    ("torch.distributed.checkpoint.planner", "TensorWriteData"): _Record,
    ("torch.distributed.checkpoint.planner", "WriteItem"): _Record,
    ("torch.distributed.checkpoint.planner", "WriteItemType"): _Constant,
    **{("torch", name): _Constant() for name, it in vars(torch).items() if isinstance(it, torch.dtype)},
}
# Globals for plain values and for empty bytes, which Transformer Engine writes if nothing is in FP8.
OBJECT_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Constant,
    ("torch", "ByteStorage"): _Constant,
    ("torch._utils", "_rebuild_tensor_v2"): _Constant,
}


class _Follower(pickle.Unpickler):
    """Unpickler that uses stand-ins for the globals that a pickle may name, and refuses others."""

    def __init__(self, data: bytes, allowed: Mapping[tuple[str, str], Any], encoding: str = "ASCII") -> None:
        super().__init__(io.BytesIO(data), encoding=encoding)
        self._allowed = allowed

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in self._allowed:
            # Escaped and shortened: the error is one line, whatever the file contains.
            shown = ascii(f"{module}.{name}")[1:-1][:200]
            raise pickle.UnpicklingError(f"it holds {shown}, which nothing in a checkpoint needs")
        return self._allowed[module, name]

    def persistent_load(self, pid: Any, /) -> Any:
        """Stand-in for a storage beside the pickle. An index that refers to one is refused by torch."""
        return _Constant()


def vet(folder: Path) -> None:
    """Check that `dist_checkpointing.load` of `folder` runs no code from it: every pickle that it would read
    makes only descriptions of tensors, plain values and empty bytes.

    Raises CheckpointError naming the file and what it holds, also if it is damaged or links elsewhere.
    """
    for other in sorted(folder.glob(f"*{METADATA}")):
        # torch falls back to the index of a single rank if it cannot read the common one.
        if other.name != METADATA:
            raise CheckpointError(f"{other} is a second index, which no checkpoint has: remove it")
    index = read_index(_inside(folder / METADATA))
    for key, entry in index.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            _vet_object(folder, key, index.storage_data[MetadataIndex(key)])
    # lexists, because a link that is broken on this node may lead to a file on another node.
    if os.path.lexists(folder / COMMON):
        with _told(str(folder / COMMON), "Megatron's common state"):
            _check_common(_vetted(_read(_inside(folder / COMMON))))


def read_index(path: Path) -> Metadata:
    """Read `.metadata`. Unpickles it only after a first run with stand-ins for its globals, and checks the
    type of everything in the result. Raises CheckpointError if either fails."""
    with _told(str(path), "the index of a checkpoint"):
        data = _read(path)
        _Follower(data, INDEX_GLOBALS).load()
        index = pickle.loads(data)  # noqa: S301 - names nothing but what was allowed, by the line above
        _check_index(index)
        return index


def _vet_object(folder: Path, key: str, place: _StorageInfo) -> None:
    file = _inside(folder / place.relative_path)
    with _told(f"{file}, where it holds the object {key!a},", "part of a checkpoint"):
        objects = _vetted(_read(file, place.offset, place.length))
        if type(objects) is not list or not objects:
            raise TypeError("it is not a list of objects")
        for found in objects:
            _check_object(found)
        if key == COMMON_OBJECT:
            _check_common(objects[0])


def _vetted(data: bytes) -> Any:
    """Load what torch.save wrote, after running its pickle with stand-ins for its globals."""
    file = io.BytesIO(data)
    if not torch.serialization._is_zipfile(file):
        raise pickle.UnpicklingError("it is not what torch.save writes")
    with torch.serialization._open_zipfile_reader(file) as archive:
        if torch.serialization._is_torchscript_zip(archive):
            raise pickle.UnpicklingError(
                "it holds a program (TorchScript), which nothing in a checkpoint needs"
            )
        _Follower(archive.get_record("data.pkl"), OBJECT_GLOBALS, encoding="utf-8").load()
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def _check_object(found: Any) -> None:
    """Raise unless `found` is a state. Bytes are refused: Transformer Engine would unpickle them."""
    if isinstance(found, Tensor) and found.numel():
        raise pickle.UnpicklingError(f"it holds {found.numel()} bytes for Transformer Engine to unpickle")
    if not isinstance(found, Tensor | dict | None):
        raise TypeError(f"it is {type(found).__name__}, and not a state")


def _check_common(found: Any) -> None:
    if type(found) is not dict:
        raise TypeError(f"it is {type(found).__name__}, and not a state")


def _check_index(index: Any) -> None:
    """Check that each part has the type that its name implies: a pickle may put allowed objects anywhere."""
    _check(type(index) is Metadata and type(index.storage_meta) in (StorageMeta, type(None)))
    _check(type(index.state_dict_metadata) is dict and type(index.storage_data) is dict)
    entries: dict[Any, Any] = index.state_dict_metadata
    places: dict[Any, Any] = index.storage_data
    for where, info in places.items():
        _check(type(where) is MetadataIndex and type(where.fqn) is str)
        _check_place(info)
    for key, entry in entries.items():
        _check(type(key) is str)
        if type(entry) is TensorStorageMetadata:
            _check_tensor(entry)
        else:
            _check(type(entry) is BytesStorageMetadata and MetadataIndex(key) in places)


def _check_tensor(entry: TensorStorageMetadata) -> None:
    _check(type(entry.properties) is TensorProperties and type(entry.properties.dtype) is torch.dtype)
    _check(type(entry.size) is torch.Size and type(entry.chunks) is list)
    for chunk in entry.chunks:
        _check(type(chunk) is ChunkStorageMetadata)
        _check(type(chunk.offsets) is torch.Size and type(chunk.sizes) is torch.Size)
        _check(len(chunk.offsets) == len(chunk.sizes) == len(entry.size))


def _check_place(info: Any) -> None:
    """Check that `info` refers to bytes of a file in the folder itself, without transforms."""
    _check(type(info) is _StorageInfo and type(info.relative_path) is str and not info.transform_descriptors)
    name = info.relative_path
    _check(name == Path(name).name and name not in ("", "..") and name.isprintable())
    _check(all(type(number) is int and number >= 0 for number in (info.offset, info.length)))


def _check(holds: bool) -> None:
    if not holds:
        raise TypeError("it is not a description of tensors")


def _read(path: Path, offset: int = 0, length: int | None = None) -> bytes:
    """Read `length` bytes from `offset`, or the whole file. Raises OSError or EOFError if the bytes are not
    there, before memory is allocated for them."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing or not a file")
    size = path.stat().st_size
    end = size if length is None else offset + length
    if end > size:
        raise EOFError(f"{path} is cut short, {size} bytes of at least {end}")
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(end - offset)


def _inside(path: Path) -> Path:
    """Return `path` if it is not a link out of its folder, which might lead to another file on every node."""
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(path.parent):
        raise CheckpointError(f"{path} is a link out of the checkpoint: put the file itself in its place")
    return path


@contextmanager
def _told(place: str, kind: str) -> Iterator[None]:
    """Convert errors raised in the block to a CheckpointError with a message of one line."""
    try:
        yield
    except CheckpointError:
        raise
    except DAMAGE as error:
        reason = f"{error}".partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"{place} cannot be read as {kind}: {reason}. {ADVICE}") from error
