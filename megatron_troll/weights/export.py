"""Hugging Face tensors from a Megatron model: a stream, and a folder written from it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.parallel import device
from megatron_troll.parallel.groups import Group
from megatron_troll.weights.families import table_of
from megatron_troll.weights.folder import FolderWriter, check_target
from megatron_troll.weights.original import original, slots, together
from megatron_troll.weights.placement import held_parameters, shard_group
from megatron_troll.weights.table import Place, Table, Tensors, tensors_of

MAX_SHARD_BYTES = 5 * 2**30
Names = tuple[str, ...]


@dataclass(frozen=True)
class ShardHeader:
    """Facts about a parameter that the other pipeline stages need to receive its shard."""

    stage: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@torch.no_grad()
def stream(model: MegatronModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint once, as (name, full tensor in the parameter's dtype, on its device).

    Each step is a collective over the pipeline, tensor- and expert-parallel groups: all ranks must iterate
    to the end, in step. All see the same names in the same order and all receive the values. Holds one
    Megatron parameter at a time (for experts, one of each expert-parallel rank). A tensor may share memory
    with the parameter: copy it to keep it. The order of experts depends on the layout. Blocks.
    """
    yield from tensors_of(_parameters(model))


def save(
    model: MegatronModel,
    folder: str | Path,
    source_folder: str | Path,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    ends: Sequence[int] = (),
) -> list[str]:
    """Write `model` to `folder` in Hugging Face format: safetensors in files of at most `max_shard_bytes`
    (one tensor at least), their index, and the config, tokenizer and carried tensors of `source_folder`;
    experts are stacked or apart as they are there; `ends`, if any, become the ends of sequence of its
    generation_config.json. Returns what a reader of the export should know.
    Rank 0 writes; an earlier export at `folder` is replaced once the new one is on disk. Rank 0 holds one
    file in memory, and a stacked tensor. Blocks until it is done on every rank.

    Raises ValueError if `folder` holds anything but an earlier export, or `source_folder` has no config;
    FileNotFoundError if it lacks tensors that the export must have.
    """
    target, source, table = Path(folder), Path(source_folder), table_of(model.shape)
    model.groups.world.first(lambda: check_target(target, source))

    def write(tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
        begun = original(source, table)
        with FolderWriter(target, source, max_shard_bytes, ends) as writer:
            for name, tensor in together(tensors, slots(table, begun.stacked)):
                writer.add(name, tensor)
            for name in begun.carried.names:
                writer.add(name, begun.carried.source.read(name), trained=False)
        return begun.remarks

    return first_takes(model, write)


def first_takes[T](model: MegatronModel, take: Callable[[Iterator[tuple[str, Tensor]]], T]) -> T:
    """Call `take` with the stream of `model` on rank 0; return its result or raise its error on every rank
    (Group.first). Every rank iterates the stream to its end, even if `take` stops early. Blocks."""
    tensors = stream(model)

    def act() -> T:
        try:
            return take(tensors)
        finally:
            drain(tensors)

    if model.groups.world.rank > 0:
        drain(tensors)
    return model.groups.world.first(act)


def drain(tensors: Iterator[object]) -> None:
    for _ in tensors:
        pass


def _parameters(model: MegatronModel) -> Iterator[tuple[Place, Tensors]]:
    """Every parameter of the whole model, as its full parts."""
    table = table_of(model.shape)
    mine = {
        held.place.names: held.parameter
        for held in held_parameters(model, table)
        if not held.place.entry.copy
    }
    shards = _shards(mine, model.groups.pp)
    for place in _local_places(table, model.groups.ep):
        yield from _assemble(model, place, mine.get(place.names), shards[place.names])
        model.progress()


def _local_places(table: Table, ep: Group) -> Iterator[Place]:
    """The places of this expert-parallel rank on all pipeline stages; ranks iterate theirs in step."""
    per_rank = table.experts // ep.size
    for place in table.places():
        if not place.entry.copy and (place.expert is None or place.expert // per_rank == ep.rank):
            yield place


def _shards(mine: dict[Names, nn.Parameter], pp: Group) -> dict[Names, ShardHeader]:
    """The header of every parameter's shard, gathered from all pipeline stages."""
    own = {
        names: ShardHeader(pp.rank, tuple(parameter.shape), parameter.dtype)
        for names, parameter in mine.items()
    }
    return {names: shard for stage in pp.all_gather_objects(own) for names, shard in stage.items()}


def _assemble(
    model: MegatronModel, place: Place, parameter: nn.Parameter | None, shard: ShardHeader
) -> Iterator[tuple[Place, Tensors]]:
    """Gather one parameter, or for an expert the one of each expert-parallel rank."""
    groups, entry = model.groups, place.entry
    if parameter is None:
        local = torch.empty(shard.shape, dtype=shard.dtype, device=device())
    else:
        local = parameter.detach()
    groups.pp.broadcast(local, shard.stage)
    parts = entry.join(shard_group(groups, entry).all_gather(local))
    if place.expert is None:
        yield place, parts
        return
    per_rank = model.shape.experts // groups.ep.size
    gathered = zip(*(groups.ep.all_gather(part) for part in parts), strict=True)
    for rank, parts in enumerate(gathered):
        yield Place(entry, place.layer, rank * per_rank + place.expert % per_rank), parts
