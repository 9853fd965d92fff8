"""The parameters that one rank holds, from the weight table of the model's family."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megatron_troll.launch.plan.ranks import Ranks
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.table import Entry, Table

EMBEDDING, ROUTER = "embedding.word_embeddings.weight", "mlp.router.weight"


@dataclass(frozen=True)
class Parameter:
    """`count` parameters of one rank of `numel` numbers each.

    padding   of `numel`, rows that stand for no token
    expert    kept apart for each expert-parallel rank: its gradients have their own data-parallel group
    shared    the tied embedding, of which the first and the last stage have a copy each
    trained   has a gradient and optimizer state
    """

    name: str
    numel: int
    count: int = 1
    padding: int = 0
    expert: bool = False
    shared: bool = False
    trained: bool = True


@dataclass(frozen=True)
class Holding:
    """What decides who holds what. `tied`: the head is the embedding; `frozen_router`: routers are not
    trained."""

    table: Table
    ranks: Ranks
    tied: bool
    frozen_router: bool = False

    def of_chunk(self, stage: int, chunk: int) -> list[Parameter]:
        """The parameters of one chunk of a stage on each of its ranks, in the order of the model."""
        layers = self.ranks.layers(stage, chunk, self.table.layers)
        outside = {part: self._outside(part) for part in ("embedding", "head")}
        found = [*outside["embedding"]] if self.ranks.is_first(stage, chunk) else []
        for layer in layers:
            found += self._layer(self.table.layer_types[layer])
        return [*found, *outside["head"]] if self.ranks.is_last(stage, chunk) else found

    def _outside(self, part: str) -> Iterator[Parameter]:
        alone = self.ranks.layout.pp == 1
        for entry in self.table.entries:
            first = EMBEDDING in entry.megatron
            if entry.per_layer or first != (part == "embedding") or (entry.copy and alone):
                continue
            vocabulary = first or entry.padded
            yield self._parameter(entry, shared=self.tied and vocabulary and not alone)

    def _layer(self, kind: str) -> Iterator[Parameter]:
        for entry in self.table.entries:
            if entry.per_layer and entry.layer_type in (None, kind):
                yield self._parameter(entry)

    def _parameter(self, entry: Entry, shared: bool = False) -> Parameter:
        layout = self.ranks.layout
        shards = layout.etp if entry.per_expert else layout.tp
        numel, padding = shard_sizes(entry, shards)
        return Parameter(
            name=entry.megatron[0],
            numel=numel,
            count=self.table.experts // layout.ep if entry.per_expert else 1,
            padding=padding,
            expert=entry.per_expert and layout.ep > 1,
            shared=shared,
            trained=not (self.frozen_router and entry.megatron[0].endswith(ROUTER)),
        )


def shard_sizes(entry: Entry, shards: int) -> tuple[int, int]:
    """Numbers of the largest shard of an entry, and how many of all its shards' are padding."""
    tensors = tuple(torch.empty(tensor.shape, device="meta") for tensor in entry.hf)
    numel = entry.shard(tensors, 0, shards).numel()
    whole = sum(tensor.numel() for tensor in tensors)
    return numel, numel * shards - whole if entry.padded else 0


def carried_parameters(table: Table, shape: ModelShape) -> int:
    """Of the layer that predicts a second token, in the published checkpoints of families whose tables carry
    it: a layer of full attention, a projection of two hidden states to one, and three norms."""
    if not table.carried:
        return 0
    layer = sum(
        tensor_size(entry) * (table.experts if entry.per_expert else 1)
        for entry in table.entries
        if entry.per_layer and entry.layer_type in (None, "full_attention")
    )
    return layer + 2 * shape.hidden**2 + 3 * shape.hidden


def tensor_size(entry: Entry) -> int:
    return sum(math.prod(tensor.shape) for tensor in entry.hf)
