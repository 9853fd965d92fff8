"""Fill a Megatron model from Hugging Face tensors."""

import torch

from megatron_troll.config import ConfigError
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.weights.families import table_of
from megatron_troll.weights.placement import Held, held_parameters, shard_group
from megatron_troll.weights.source import Source, Unstacked, check
from megatron_troll.weights.table import Table


@torch.no_grad()
def load(model: MegatronModel, source: Source, table: Table | None = None) -> None:
    """Copy `source` into this rank's parameters, in their dtype. Reads only the layers and experts that
    this rank holds, one Megatron parameter at a time; no communication. An optimizer that keeps fp32 copies
    of the parameters has to be built afterwards. `table` defaults to that of the model's family.

    Raises ConfigError listing every missing, unused and wrongly shaped tensor, before anything is copied.
    """
    table = table or table_of(model.shape)
    source = Unstacked(source, table)
    check(source, table, tied=model.shape.tied)
    for held in held_parameters(model, table):
        _fill(model, held, source)
        model.progress()


def _fill(model: MegatronModel, held: Held, source: Source) -> None:
    entry, parameter = held.place.entry, held.parameter
    group = shard_group(model.groups, entry)
    shard = entry.shard(tuple(source.read(name) for name in held.place.names), group.rank, group.size)
    if shard.shape != parameter.shape:
        raise ConfigError(
            f"{', '.join(held.place.names)}: shard {group.rank} of {group.size} has shape "
            f"{tuple(shard.shape)}, Megatron's parameter {tuple(parameter.shape)}"
        )
    parameter.copy_(shard)
