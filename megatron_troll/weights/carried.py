"""Tensors that belong to a checkpoint and to no model of ours: they go from folder to folder as they are."""

from dataclasses import dataclass
from pathlib import Path

from megatron_troll.mcore.checkpoint_folder import is_checkpoint
from megatron_troll.weights.source import INDEX, SINGLE, FolderSource, Source, TensorSource
from megatron_troll.weights.table import Table

# In a folder with a Megatron checkpoint, they lie in a folder of their own.
CARRIED = "carried"


@dataclass(frozen=True)
class Carried:
    """The names of the tensors that `source` carries."""

    source: Source
    names: tuple[str, ...]


def carried_by(folder: Path, table: Table) -> Carried:
    """What a folder with a model of `table` carries; nothing where it has no weights."""
    place = folder / CARRIED if is_checkpoint(folder) else folder
    if not table.carried or not any((place / name).is_file() for name in (INDEX, SINGLE)):
        return Carried(TensorSource({}), ())
    source = FolderSource(place)
    return Carried(source, tuple(name for name in source.shapes if name.startswith(table.carried)))
