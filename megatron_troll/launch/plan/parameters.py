"""The parameters that one rank holds, from the weight table of the model's family."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch

from megatron_troll.launch.plan.ranks import Ranks
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.table import Entry, Table

EMBEDDING, ROUTER = "embedding.word_embeddings.weight", "mlp.router.weight"
# The order of a layer's parameters in Megatron's local modules, which their buffers follow.
LINEAR = ("dt_bias", "A_log", "in_proj", "conv1d", "out_norm", "out_proj")
FULL = ("linear_proj", "linear_qkv", "q_layernorm", "k_layernorm")
FEEDING = (
    "pre_mlp_layernorm",
    "router",
    "local_experts",
    "gate_weight",
    "linear_fc1",
    "activation_func",
    "linear_fc2",
)
ORDER = ("input_layernorm", *LINEAR, *FULL, *FEEDING)


@dataclass(frozen=True)
class Parameter:
    """One parameter of one rank, with `numel` elements.

    padding   elements of all its shards in rows that stand for no token
    expert    an expert's, with gradients reduced over a data-parallel group of their own
    shared    the tied embedding, of which the first and the last stage each have a copy
    trained   has a gradient and optimizer state
    matrix    updated by Muon, if that is the optimizer
    cut       the ranks it is cut over, as a kind of Traffic; "" if every rank has it whole
    """

    name: str
    numel: int
    padding: int = 0
    expert: bool = False
    shared: bool = False
    trained: bool = True
    matrix: bool = False
    cut: Literal["", "tensor", "expert_tensor"] = ""


@dataclass(frozen=True)
class Holding:
    """The inputs that determine which rank holds which parameters. `tied`: the head is the embedding;
    `frozen_router`: routers are not trained."""

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
            yield self._parameter(entry, shared=self.tied and vocabulary and not alone, outside=True)

    def _layer(self, kind: str) -> Iterator[Parameter]:
        """Parameters of a layer, expert after expert. Transformer Engine orders grouped experts differently,
        which moves their padding."""
        mine = [entry for entry in self.table.entries if entry.per_layer and entry.layer_type in (None, kind)]
        mine.sort(key=lambda entry: next(i for i, part in enumerate(ORDER) if part in entry.megatron[0]))
        for per_expert, entries in groupby(mine, lambda entry: entry.per_expert):
            parameters = [self._parameter(entry) for entry in entries]
            yield from parameters * (self.table.experts // self.ranks.layout.ep if per_expert else 1)

    def _parameter(self, entry: Entry, shared: bool = False, outside: bool = False) -> Parameter:
        """Build the Parameter of an entry. `outside`: it is not part of a layer."""
        layout = self.ranks.layout
        shards = layout.etp if entry.per_expert else layout.tp
        shape, padding = shard_sizes(entry, shards)
        return Parameter(
            name=entry.megatron[0],
            numel=shape.numel(),
            padding=padding,
            expert=entry.per_expert and (layout.ep > 1 or layout.etp != layout.tp),
            shared=shared,
            trained=entry.trained and not (self.frozen_router and entry.megatron[0].endswith(ROUTER)),
            matrix=not outside and len(shape) == 2 and shape[0] > 1,
            cut="" if entry.axis is None else "expert_tensor" if entry.per_expert else "tensor",
        )


def shard_sizes(entry: Entry, shards: int) -> tuple[torch.Size, int]:
    """The shape of the largest shard of an entry, and the number of padding elements over all its shards."""
    tensors = tuple(torch.empty(tensor.shape, device="meta") for tensor in entry.hf)
    shape = entry.shard(tensors, 0, shards).shape
    whole = sum(tensor.numel() for tensor in tensors)
    return shape, shape.numel() * shards - whole if entry.padded else 0


def carried_parameters(table: Table, shape: ModelShape) -> int:
    """Parameters of the multi-token-prediction layer, in the published checkpoints of families whose tables
    carry it: a layer of full attention, a projection of two hidden states to one, and three norms."""
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
