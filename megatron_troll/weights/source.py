"""Sources of full Hugging Face tensors, which are read one at a time by name."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.mcore.checkpoint_folder import is_checkpoint
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.families import table_of
from megatron_troll.weights.table import Table
from megatron_troll.weights.tensor_file import Stored, TensorFileError, read_header, read_tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DECAY_RATES = (0.01, 16.0)


class Source(Protocol):
    """Full tensors by name. `read` gives a tensor, or its `index`-th row along the first axis."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: int | None = None) -> Tensor: ...


def open_source(folder: str | Path, shape: ModelShape) -> Source:
    """The weights of a folder in Hugging Face format, or of one that `mtroll convert hf2mcore` wrote.

    Raises FileNotFoundError or ValueError if it has no weights or they cannot be read.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        return FolderSource(folder)
    # Importing torch.distributed.checkpoint takes half as long as torch: do so only to read a checkpoint.
    from megatron_troll.weights.checkpoint_source import checkpoint_of

    return checkpoint_of(folder, shape)


class TensorSource:
    """Tensors in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        return self.tensors[name] if index is None else self.tensors[name][index]


class FolderSource:
    """The safetensors files of a Hugging Face folder; one tensor at a time is read into memory. Pickled
    checkpoints are never opened.

    Raises FileNotFoundError if there are no safetensors files, or if the folder lacks files that the index
    lists; ValueError if files are not safetensors or are cut short, or lack tensors that the index lists.
    Errors name every such file or tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._opened: tuple[str, BinaryIO | None] = ("", None)
        self._stored = self._scan()
        self._shapes = {name: stored.shape for name, (_, stored) in self._stored.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return [self.folder / file for file in self._listed()]

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name][1].dtype

    def read(self, name: str, index: int | None = None) -> Tensor:
        file, stored = self._stored[name]
        try:
            return read_tensor(self._open(file).fileno(), stored, index)
        except OSError as error:
            raise OSError(f"{name} cannot be read from {self.folder / file}: {error}") from error

    def _open(self, file: str) -> BinaryIO:
        """Open a file and keep it open: most reads follow a read of the same file."""
        name, opened = self._opened
        if opened is None or name != file:
            opened = open(self.folder / file, "rb", buffering=0)  # noqa: SIM115 - closed when it is replaced
            self._opened = (file, opened)
        return opened

    def _scan(self) -> dict[str, tuple[str, Stored]]:
        stored: dict[str, tuple[str, Stored]] = {}
        broken = []
        for file in self._listed():
            try:
                header = read_header(self.folder / file)
            except TensorFileError as error:
                broken.append(str(error))
                continue
            # If two files hold a tensor, the index decides.
            stored |= {
                name: (file, tensor) for name, tensor in header.items() if self._index.get(name, file) == file
            }
        if broken:
            raise ConfigError("\n".join(broken))
        if absent := sorted(set(self._index) - set(stored)):
            raise ConfigError(
                f"{self.folder / INDEX} lists tensors that their files lack; download the folder again:\n  "
                + "\n  ".join(absent)
            )
        return stored

    def _listed(self) -> list[str]:
        files = sorted(set(self._index.values())) or [SINGLE]
        absent = [file for file in files if not (self.folder / file).is_file()]
        if absent and not self._index:
            raise FileNotFoundError(
                f"no {INDEX} or {SINGLE} in {self.folder}: weights are read from safetensors only (convert "
                "other formats first), or use init=random"
            )
        if absent:
            raise FileNotFoundError(
                f"{self.folder / INDEX} lists files that are missing: {', '.join(absent)}"
            )
        return files

    @cached_property
    def _index(self) -> dict[str, str]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            return dict(json.loads(path.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); download it again") from error


class RandomSource:
    """A randomly initialized model, fp32: each tensor follows `HFTensor.init`, with a generator seeded by
    (seed, name), so that it is the same on every layout."""

    def __init__(self, shape: ModelShape, seed: int) -> None:
        self.std, self.seed = shape.init_std, seed
        self._tensors = table_of(shape).tensors()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, index: int | None = None) -> Tensor:
        tensor = self._tensors[name]
        drawn = torch.empty(tensor.shape)
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        match tensor.init:
            case "normal":
                drawn.normal_(0.0, self.std, generator=generator)
            case "decay":
                drawn.uniform_(*DECAY_RATES, generator=generator).log_()
            case "ones":
                drawn.fill_(1.0)
            case "zeros":
                drawn.zero_()
        return drawn if index is None else drawn[index]


class Unstacked:
    """`source` with its stacked expert tensors (`Table.stacked`) under the names of single experts."""

    def __init__(self, source: Source, table: Table) -> None:
        self.source = source
        self._shapes = dict(source.shapes)
        self._inside: dict[str, tuple[str, int, int, int]] = {}
        for stacked in table.stacked:
            for layer in range(table.layers):
                self._expand(stacked.name.format(l=layer), stacked.pieces, layer)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        return self.source.dtype(self._inside[name][0] if name in self._inside else name)

    def read(self, name: str, index: int | None = None) -> Tensor:
        if name not in self._inside:
            return self.source.read(name, index)
        stacked, expert, piece, pieces = self._inside[name]
        tensor = self.source.read(stacked, expert).chunk(pieces, 0)[piece]
        return tensor if index is None else tensor[index]

    def _expand(self, name: str, pieces: tuple[str, ...], layer: int) -> None:
        """Replace a stacked tensor by its pieces; one that cannot hold them stays, for `check` to report."""
        shape = self._shapes.get(name, ())
        if len(shape) < 2 or shape[1] % len(pieces):
            return
        del self._shapes[name]
        for expert in range(shape[0]):
            for i, piece in enumerate(pieces):
                single = piece.format(l=layer, e=expert)
                self._inside[single] = (name, expert, i, len(pieces))
                self._shapes[single] = (shape[1] // len(pieces), *shape[2:])


# In a folder with a Megatron checkpoint, carried tensors have a folder of their own.
CARRIED = "carried"


@dataclass(frozen=True)
class Carried:
    """Tensors `names` of `source`: they belong to the checkpoint, but to no model of ours."""

    source: Source
    names: tuple[str, ...]


def carried_by(folder: Path, table: Table) -> Carried:
    """The carried tensors of a folder with a model of `table`; none if it has no weights."""
    place = folder / CARRIED if is_checkpoint(folder) else folder
    if not table.carried or not any((place / name).is_file() for name in (INDEX, SINGLE)):
        return Carried(TensorSource({}), ())
    source = FolderSource(place)
    return Carried(source, tuple(name for name in source.shapes if name.startswith(table.carried)))


# Written by some tools although config.json ties the head to the embedding.
TIED_HEAD = "lm_head.weight"


def check_folder(folder: str | Path, shape: ModelShape) -> None:
    """Raise ConfigError or FileNotFoundError unless `folder` holds a model of `shape`. Reads headers only."""
    table = table_of(shape)
    check(Unstacked(open_source(folder, shape), table), table, tied=shape.tied)


def check(source: Source, table: Table, *, tied: bool) -> None:
    """Raise ConfigError unless `source` holds exactly the tensors of `table`, in their shapes. It may also
    hold carried tensors."""
    expected = {name: tensor.shape for name, tensor in table.tensors().items()}
    found = source.shapes
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [
        f"unused: {name} {shape}"
        for name, shape in found.items()
        if name not in expected and not name.startswith(table.carried) and not (tied and name == TIED_HEAD)
    ]
    problems += [
        f"wrong shape: {name} {found[name]}, the config says {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        raise ConfigError(
            "the weights do not fit config.json (is it of another model, or was the download cut short?):\n  "
            + "\n  ".join(problems)
        )
