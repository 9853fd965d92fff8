"""The parameters of the whole model that this rank holds."""

import re
from dataclasses import dataclass

from torch import nn

from megatron_troll.mcore.model import HiddenStateModel, MegatronModel
from megatron_troll.parallel.groups import Group, Groups
from megatron_troll.weights.table import Entry, Place, Table

LAYER = re.compile(r"(decoder\.layers\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Held:
    """A parameter of this rank (its shard) and its place in the whole model."""

    place: Place
    parameter: nn.Parameter


def held_parameters(model: MegatronModel, table: Table) -> list[Held]:
    """Every parameter of this rank, stage by stage.

    Raises ValueError naming the parameters that have no entry in the table.
    """
    held, unknown = [], []
    first_expert = table.experts // model.groups.ep.size * model.groups.ep.rank
    for stage in model.stages:
        for name, parameter in stage.named_parameters():
            place = table.find(_global_layer(stage, name))
            if place is None:
                unknown.append(name)
                continue
            expert = None if place.expert is None else place.expert + first_expert
            held.append(Held(Place(place.entry, place.layer, expert), parameter))
    if unknown:
        raise ValueError(
            f"the weight table of {model.shape.family} has no entry for Megatron's {', '.join(unknown)}"
        )
    return held


def shard_group(groups: Groups, entry: Entry) -> Group:
    """The group of ranks over which an entry is sharded."""
    return groups.etp if entry.per_expert else groups.tp


def _global_layer(stage: HiddenStateModel, name: str) -> str:
    """`name` with its layer counted over the whole model, from 0."""
    found = LAYER.fullmatch(name)
    if found is None:
        return name
    number: int = stage.decoder.layers[int(found[2])].layer_number  # pyright: ignore[reportAssignmentType]
    return f"{found[1]}{number - 1}{found[3]}"
