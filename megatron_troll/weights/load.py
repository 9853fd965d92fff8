"""Fill a Megatron model from Hugging Face tensors."""

import torch

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.weights.families import table_of
from megatron_troll.weights.placement import Held, held_parameters, shard_group
from megatron_troll.weights.source import Source, Unstacked
from megatron_troll.weights.table import Table

# Written by some tools although config.json ties the head to the embedding.
TIED_HEAD = "lm_head.weight"


@torch.no_grad()
def load(model: MegatronModel, source: Source) -> None:
    """Copy `source` into this rank's parameters, in their dtype. Reads only the layers and experts that
    this rank holds, one Megatron parameter at a time; no communication. An optimizer that keeps fp32 copies
    of the parameters has to be built, or told to reload, afterwards.

    Raises ValueError listing every missing, unused and wrongly shaped tensor, before anything is copied.
    """
    table = table_of(model.shape)
    source = Unstacked(source, table)
    check(source, table, tied=model.shape.tied)
    for held in held_parameters(model, table):
        _fill(model, held, source)


def check(source: Source, table: Table, *, tied: bool) -> None:
    """Raise ValueError unless `source` holds exactly the tensors of `table`, in their shapes."""
    expected = {name: tensor.shape for name, tensor in table.tensors().items()}
    found = source.shapes
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    problems += [
        f"unused: {name} {shape}"
        for name, shape in found.items()
        if name not in expected and not (tied and name == TIED_HEAD)
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


def _fill(model: MegatronModel, held: Held, source: Source) -> None:
    entry, parameter = held.place.entry, held.parameter
    group = shard_group(model.groups, entry)
    shard = entry.shard(tuple(source.read(name) for name in held.place.names), group.rank, group.size)
    if shard.shape != parameter.shape:
        raise ValueError(
            f"{', '.join(held.place.names)}: shard {group.rank} of {group.size} has shape "
            f"{tuple(shard.shape)}, Megatron's parameter {tuple(parameter.shape)}"
        )
    parameter.copy_(shard)
