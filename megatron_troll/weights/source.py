"""Sources of full Hugging Face tensors, which are read one at a time by name."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.mcore.checkpoint_folder import CheckpointError, is_checkpoint
from megatron_troll.mcore.checkpoint_sums import check_folder_sums
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.parallel.groups import Group
from megatron_troll.weights.families import table_of
from megatron_troll.weights.families.parts import VISION
from megatron_troll.weights.folder_source import FolderSource
from megatron_troll.weights.scaled import Scaled, open_folder
from megatron_troll.weights.table import Table

if TYPE_CHECKING:
    from megatron_troll.weights.checkpoint_source import CheckpointSource

DECAY_RATES = (0.01, 16.0)


class Source(Protocol):
    """Full tensors by name. `read` gives a tensor, or its `index`-th row along the first axis."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def read(self, name: str, index: int | None = None) -> Tensor: ...


def open_source(folder: str | Path, shape: ModelShape) -> "FolderSource | Scaled | CheckpointSource":
    """The weights of a folder in Hugging Face format, or of one that `mtroll convert hf2mcore` wrote. FP8
    weights are read in fp32, so that they are rounded once, to the dtype of the model.

    Raises FileNotFoundError or ConfigError if it has no weights or they cannot be read.
    """
    folder = Path(folder)
    if not is_checkpoint(folder):
        return open_folder(folder, torch.float32)
    # Importing torch.distributed.checkpoint takes half as long as torch: do so only to read a checkpoint.
    from megatron_troll.weights.checkpoint_source import checkpoint_of

    try:
        return checkpoint_of(folder, shape)
    except CheckpointError as error:
        raise ConfigError(str(error)) from error


def open_checked(folder: str | Path, shape: ModelShape, world: Group) -> Source:
    """`open_source`, once the files are as the folder's SHA256SUMS says, if it has one. Each rank reads a
    share of them; blocks. Raises SumsError on every rank too."""
    folder = Path(folder)
    source = open_source(folder, shape)
    names = [os.path.relpath(file, folder) for file in source.files]
    world.each(lambda: check_folder_sums(folder, names, world.rank, world.size))
    return source


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
            case value:
                drawn.fill_(value)
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
        """Replace a stacked tensor by its pieces; one that cannot hold them, or beside which there are some,
        stays, for `check` to report."""
        shape = self._shapes.get(name, ())
        if len(shape) < 2 or shape[1] % len(pieces) or pieces[0].format(l=layer, e=0) in self._shapes:
            return
        del self._shapes[name]
        for expert in range(shape[0]):
            for i, piece in enumerate(pieces):
                single = piece.format(l=layer, e=expert)
                self._inside[single] = (name, expert, i, len(pieces))
                self._shapes[single] = (shape[1] // len(pieces), *shape[2:])


# Written by some tools although config.json ties the head to the embedding.
TIED_HEAD = "lm_head.weight"


def remarks_on(folder: str | Path) -> list[str]:
    """Remarks on the weights in a folder: whether they are multiplied by scales, and what
    is left out. Reads headers only."""
    source = None if is_checkpoint(Path(folder)) else open_folder(folder)
    return source.remarks if isinstance(source, Scaled) else []


def check_folder(folder: str | Path, shape: ModelShape) -> None:
    """Raise ConfigError or FileNotFoundError unless `folder` holds a model of `shape`. Reads headers only."""
    table = table_of(shape)
    check(Unstacked(open_source(folder, shape), table), table, tied=shape.tied)


def check_random(shape: ModelShape) -> None:
    """Raise ConfigError if random weights of `shape` would not be a whole model."""
    if VISION in table_of(shape).carried:
        raise ConfigError(
            f"init=random: a {shape.family} has a vision tower, which is not made here: write the "
            "text_config of config.json as a config.json of its own"
        )


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
