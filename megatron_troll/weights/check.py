"""Whether a folder holds the weights that its config.json describes."""

from pathlib import Path

from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.families import table_of
from megatron_troll.weights.source import Source, Unstacked, open_source
from megatron_troll.weights.table import Table

# Written by some tools although config.json ties the head to the embedding.
TIED_HEAD = "lm_head.weight"


def check_folder(folder: str | Path, shape: ModelShape) -> None:
    """Raise ValueError or FileNotFoundError unless `folder` holds a model of `shape`. Reads headers only."""
    table = table_of(shape)
    check(Unstacked(open_source(folder, shape), table), table, tied=shape.tied)


def check(source: Source, table: Table, *, tied: bool) -> None:
    """Raise ValueError unless `source` holds exactly the tensors of `table`, in their shapes, besides those
    that it carries."""
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
        raise ValueError(
            "the weights do not fit config.json (is it of another model, or was the download cut short?):\n  "
            + "\n  ".join(problems)
        )
