"""Take over into exports of a model, from the folder in which it began, the tensors that are not trained, and
whether experts are stacked in one tensor or apart."""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_troll.config import ConfigError
from megatron_troll.mcore.checkpoint_folder import is_checkpoint
from megatron_troll.weights.families.parts import MTP, VISION
from megatron_troll.weights.folder_source import FolderSource, holds_weights
from megatron_troll.weights.scaled import open_folder
from megatron_troll.weights.source import Source, TensorSource
from megatron_troll.weights.table import Table

# In a folder with a Megatron checkpoint: a folder of carried tensors, and the names of stacked ones.
CARRIED, STACKED = "carried", "stacked.json"
KINDS = {MTP: "prediction heads", VISION: "vision tower"}


@dataclass(frozen=True)
class Carried:
    """Tensors `names` of `source`: they belong to the checkpoint, but to no model of ours."""

    source: Source
    names: tuple[str, ...]


@dataclass(frozen=True)
class Original:
    """Tensors and form that exports take over from `folder`.

    carried   tensors that go through bit for bit, in `files`
    stacked   names of the tensors that hold a matrix of all experts; the others have a tensor for each expert
    """

    folder: Path
    carried: Carried = Carried(TensorSource({}), ())
    files: tuple[Path, ...] = ()
    stacked: frozenset[str] = frozenset()

    @property
    def untrained(self) -> dict[str, int]:
        """The number of carried tensors by the beginning of their names."""
        counts = {start: sum(name.startswith(start) for name in self.carried.names) for start in KINDS}
        return {start: count for start, count in counts.items() if count}

    @property
    def remarks(self) -> list[str]:
        """Notes for a reader of an export."""
        return [
            f"{start}* ({KINDS[start]}): not trained, as in {self.folder} (tensors: {count})"
            for start, count in self.untrained.items()
        ]


def original(folder: Path, table: Table) -> Original:
    """Find what exports take over from a folder with a model of `table`, in either format. Reads headers.

    Raises FileNotFoundError if it lacks tensors that an export must have, ConfigError if files are damaged.
    """
    converted = is_checkpoint(folder)
    place = folder / CARRIED if converted else folder
    stacked = _listed(folder / STACKED) if converted else frozenset()
    if not (table.carried or table.stacked):
        return Original(folder)
    if not holds_weights(place):
        if VISION in table.carried and not converted:
            raise FileNotFoundError(
                f"{folder} has no weights: an export takes the {KINDS[VISION]} ({VISION}*) from there"
            )
        return Original(folder, stacked=stacked)
    # Of a family that carries nothing, only names are wanted.
    source = open_folder(place) if table.carried else FolderSource(place, quantised=True)
    found = stacked if converted else stacked_in(source, table)
    return Original(folder, carried_in(source, table), tuple(source.files), found)


def carried_in(source: Source, table: Table) -> Carried:
    """The carried tensors among those of `source`."""
    carried = (name for name in source.shapes if table.carried and name.startswith(table.carried))
    return Carried(source, tuple(carried))


def stacked_in(source: Source, table: Table) -> frozenset[str]:
    """The tensors of `source` that hold a matrix of all experts."""
    names = {each.name.format(l=layer) for each in table.stacked for layer in range(table.layers)}
    return frozenset(names & source.shapes.keys())


def write_stacked(folder: Path, names: Collection[str]) -> None:
    """Write the list of stacked tensors, if there are any, into a folder with a Megatron checkpoint."""
    if names:
        (folder / STACKED).write_text(json.dumps(sorted(names), indent=1) + "\n")


def _listed(path: Path) -> frozenset[str]:
    if not path.is_file():
        return frozenset()
    try:
        names: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: it is no list of names")
    return frozenset(names)


@dataclass(frozen=True)
class Slot:
    """Place of a tensor of one expert in the stacked tensor `name` of shape `whole` [experts, rows, ...]: the
    rows from `row` of `expert`."""

    name: str
    whole: tuple[int, ...]
    expert: int
    row: int


def slots(table: Table, stacked: Collection[str]) -> dict[str, Slot]:
    """The slot of each tensor that has a place in one of the tensors `stacked`, in the order of memory."""
    shapes = {tensor.name: tensor.shape for entry in table.entries for tensor in entry.hf}
    found: dict[str, Slot] = {}
    for each in table.stacked:
        pieces = [(piece, shapes[piece]) for piece in each.pieces]
        rows, rest = sum(shape[0] for _, shape in pieces), pieces[0][1][1:]
        for layer in range(table.layers):
            name = each.name.format(l=layer)
            for expert in range(table.experts) if name in stacked else ():
                row = 0
                for piece, shape in pieces:
                    slot = Slot(name, (table.experts, rows, *rest), expert, row)
                    found[piece.format(l=layer, e=expert)] = slot
                    row += shape[0]
    return found


def together(tensors: Iterable[tuple[str, Tensor]], places: dict[str, Slot]) -> Iterator[tuple[str, Tensor]]:
    """The same tensors, those that have slots as stacked tensors on the host, each after its last piece.
    Pieces may come in any order; holds the stacked tensors that are not whole yet."""
    filling: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, tensor in tensors:
        slot = places.get(name)
        if slot is None:
            yield name, tensor
            continue
        if slot.name not in filling:
            filling[slot.name] = torch.empty(slot.whole, dtype=tensor.dtype)
            missing[slot.name] = prod(slot.whole)
        filling[slot.name][slot.expert, slot.row : slot.row + len(tensor)] = tensor
        missing[slot.name] -= tensor.numel()
        if not missing[slot.name]:
            yield slot.name, filling.pop(slot.name)
    assert not filling, f"pieces are missing of {', '.join(filling)}"
