"""Plan of a conversion: the files that it writes, and the tensors in each."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, groupby, islice
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch

from megatron_troll.weights.original import Carried, Slot
from megatron_troll.weights.table import Place, Table
from megatron_troll.weights.tensor_file import TensorFileWriter, nbytes

FORMAT = 1
DtypeOf = Callable[[Place], torch.dtype]


@dataclass(frozen=True)
class TargetFile:
    """Content of one file of the target: parameters, or carried tensors; about `nbytes` bytes."""

    places: tuple[Place, ...]
    carried: tuple[str, ...]
    nbytes: int


@dataclass(frozen=True)
class Options:
    """Options of both directions: the dtype of parameters (None keeps theirs), and the largest size of a file
    of the target (one parameter at least)."""

    dtype: torch.dtype | None = None
    shard_bytes: int = 4 * 2**30


@dataclass(frozen=True)
class BothFormats:
    """The same model in both formats, and a folder with its config.json."""

    hugging_face: Path
    megatron: Path
    like: Path


class Conversion(Protocol):
    """Conversion of a folder of one format to one of the other. Nothing is written before `write`.

    options    the options that it was given
    identity   everything that the target depends on (JSON)
    shards     the files of the target, by their names in it
    remarks    what else a reader of the target should know
    """

    @property
    def options(self) -> Options: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def shards(self) -> Mapping[str, TargetFile]: ...

    @property
    def remarks(self) -> list[str]: ...

    def check(self, rank: int, size: int) -> None:
        """Check this rank's share of the source's files against its checksums. Raises SumsError."""
        ...

    def write(self, shard: TargetFile, file: BinaryIO) -> Any:
        """Write the content of a file; return what `complete` needs to know about it (JSON)."""
        ...

    def complete(self, folder: Path, records: dict[str, Any]) -> None:
        """Write the small files beside the shards, given what `write` returned for each."""
        ...

    def sides(self, target: Path) -> BothFormats:
        """The two folders once `target` is complete."""
        ...


def identity_of(kind: str, options: Options, sources: Iterable[Path]) -> dict[str, Any]:
    """Identity of a conversion that reads the files `sources`: equal identities give equal targets."""
    return {
        "format": FORMAT,
        "conversion": kind,
        "dtype": None if options.dtype is None else str(options.dtype).removeprefix("torch."),
        "shard_bytes": options.shard_bytes,
        "sources": {str(path.resolve()): [path.stat().st_size, path.stat().st_mtime_ns] for path in sources},
    }


def cut_parameters(
    table: Table, dtype: DtypeOf, limit: int, slots: Mapping[str, Slot] | None = None
) -> list[TargetFile]:
    """Every parameter of a model, in files of at most `limit` bytes (one parameter at least; all that share a
    stacked tensor are one)."""
    places = (place for place in table.places() if not place.entry.copy)
    stacks = slots or {}

    def stack(place: Place) -> object:
        slot = stacks.get(place.names[0])
        return place.names if slot is None else slot.name

    groups = (tuple(group) for _, group in groupby(places, stack))
    sized = ((group, sum(elements(place) * dtype(place).itemsize for place in group)) for group in groups)
    return [TargetFile(tuple(chain(*group)), (), size) for group, size in cut(sized, limit)]


def cut_carried(carried: Carried, limit: int) -> list[TargetFile]:
    """Carried tensors in files of at most `limit` bytes (one at least), those of larger elements first."""
    source = carried.source
    names = sorted(carried.names, key=lambda name: -source.dtype(name).itemsize)
    sized = ((name, nbytes(source.dtype(name), source.shapes[name])) for name in names)
    return [TargetFile((), names, size) for names, size in cut(sized, limit)]


def cut[T](sized: Iterable[tuple[T, int]], limit: int) -> Iterator[tuple[tuple[T, ...], int]]:
    """Items in their order, in groups of at most `limit` bytes (one item at least), with the size of each."""
    group: list[T] = []
    total = 0
    for item, size in sized:
        if group and total + size > limit:
            yield tuple(group), total
            group, total = [], 0
        group.append(item)
        total += size
    if group:
        yield tuple(group), total


def elements(place: Place) -> int:
    return sum(prod(shape) for shape in place.entry.part_shapes)


def ahead[T](items: Iterator[T]) -> Iterator[T]:
    """The same items, each made by a thread while the one before it is used. Holds two items."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(list, islice(items, 1))
        while made := coming.result():
            coming = pool.submit(list, islice(items, 1))
            yield made.pop()


def write_carried(carried: Carried, names: tuple[str, ...], file: BinaryIO) -> None:
    """Write a safetensors file of carried tensors."""
    source = carried.source
    writer = TensorFileWriter(file, {name: (source.dtype(name), source.shapes[name]) for name in names})
    for name in names:
        writer.write(name, source.read(name))
