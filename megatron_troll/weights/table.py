"""Tables that map the tensors of a Hugging Face checkpoint to Megatron's parameters and back.

A model family is one table of entries (families/); loading, export, random initialisation and parameter
counts are all derived from it.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_troll.config import ConfigError

Tensors = tuple[Tensor, ...]
Transform = Callable[[Tensors], Tensors]


def unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class HFTensor:
    """One tensor of a checkpoint. `name` may contain {l} (layer) and {e} (expert); `init` is the random
    initialization: normal(0, initializer_range), ones, zeros, a number, or for the logarithm of a decay rate
    log(uniform(0.01, 16))."""

    name: str
    shape: tuple[int, ...]
    init: Literal["normal", "ones", "zeros", "decay"] | float = "normal"


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter, or one per layer and expert if the names contain {l} and {e}.

    hf          the full tensors that make the parameter
    megatron    its names, one per layer spec (local, Transformer Engine); {l} and {e} count from 0
    to_parts    full HF tensors -> full parts. Every part is sharded separately, and a shard is the
                concatenation of its pieces along `axis`: a gated MLP has the parts (gate, up)
    from_parts  the inverse
    axis        the sharded axis; None: one part, the same on every rank. Experts are sharded over the
                expert-tensor-parallel ranks, everything else over the tensor-parallel ranks
    padded      the axis is zero-padded to equal shards (vocabulary rows); the padding is never exported
    copy        a second copy of tensors that another entry owns: loaded, neither exported nor counted
    layer_type  the only type of layers that has it; None: every layer
    trained     False for a constant that checkpoints store, which is not counted as a parameter
    """

    hf: tuple[HFTensor, ...]
    megatron: tuple[str, ...]
    to_parts: Transform = unchanged
    from_parts: Transform = unchanged
    axis: int | None = None
    padded: bool = False
    copy: bool = False
    layer_type: str | None = None
    trained: bool = True

    def only(self, layer_type: str) -> "Entry":
        """This entry, restricted to layers of one type."""
        return replace(self, layer_type=layer_type)

    @property
    def per_layer(self) -> bool:
        return "{l}" in self.hf[0].name

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.hf[0].name

    def names(self, layer: int | None, expert: int | None) -> tuple[str, ...]:
        """Names of the HF tensors for one layer and expert."""
        return tuple(tensor.name.format(l=layer, e=expert) for tensor in self.hf)

    def shard(self, tensors: Tensors, rank: int, size: int) -> Tensor:
        """Full HF tensors -> the parameter of shard `rank` of `size`. Holds a few copies of the tensors.

        Raises ConfigError if the axis cannot be divided by `size`.
        """
        parts = self.to_parts(tensors)
        if self.axis is None:
            return parts[0]
        return torch.cat([self._piece(part, rank, size) for part in parts], self.axis)

    def join(self, shards: list[Tensor]) -> Tensors:
        """The parameters of all shards, in rank order -> full parts; of one shard, in its memory."""
        if self.axis is None:
            return (shards[0],)
        axis, rows = self.axis, self._rows
        widths = [self._width(count, len(shards)) for count in rows]
        columns = zip(*(shard.split(widths, axis) for shard in shards), strict=True)
        parts = (
            column[0].contiguous() if len(column) == 1 else torch.cat(column, axis) for column in columns
        )
        return tuple(part.narrow(axis, 0, count) for part, count in zip(parts, rows, strict=True))

    @cached_property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of the full parts."""
        # Not on the meta device: its first cat imports torch._dynamo. Expanding one byte takes no memory.
        byte = torch.empty((), dtype=torch.uint8)
        parts = self.to_parts(tuple(byte.expand(tensor.shape) for tensor in self.hf))
        return tuple(tuple(part.shape) for part in parts)

    @property
    def _rows(self) -> tuple[int, ...]:
        """Unpadded length of each part along the axis."""
        return tuple(shape[self.axis] for shape in self.part_shapes if self.axis is not None)

    def _piece(self, part: Tensor, rank: int, size: int) -> Tensor:
        assert self.axis is not None
        rows = part.shape[self.axis]
        width = self._width(rows, size)
        start = min(rank * width, rows)
        piece = part.narrow(self.axis, start, min(width, rows - start))
        missing = width - piece.shape[self.axis]
        return F.pad(piece, [0, 0] * (part.dim() - 1 - self.axis) + [0, missing]) if missing else piece

    def _width(self, rows: int, size: int) -> int:
        if rows % size and not self.padded:
            raise ConfigError(
                f"{self.hf[0].name}: {rows} along axis {self.axis} cannot be divided by {size} shards"
            )
        return -(-rows // size)


@dataclass(frozen=True)
class Stacked:
    """A tensor that some checkpoints use to store a matrix of all experts: `name` [E, ...] holds the tensors
    `pieces`, concatenated along the axis after E."""

    name: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """One parameter of the whole model: an entry at a layer and an expert, both counted globally."""

    entry: Entry
    layer: int | None = None
    expert: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.entry.names(self.layer, self.expert)


@dataclass(frozen=True)
class Table:
    """One model family at one size. `layer_types`: the type of each layer in order. `carried`: name prefixes
    of tensors that belong to the checkpoint, but to no model of ours."""

    entries: tuple[Entry, ...]
    layer_types: tuple[str, ...]
    experts: int
    stacked: tuple[Stacked, ...] = ()
    carried: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    def layers_of(self, entry: Entry) -> list[int | None]:
        """The layers that have `entry`; [None] if it is outside the layers."""
        if not entry.per_layer:
            return [None]
        return [layer for layer, kind in enumerate(self.layer_types) if entry.layer_type in (None, kind)]

    def places(self) -> Iterator[Place]:
        """Every parameter of the model once: those outside the layers, then layer by layer."""
        layers = {id(entry): self.layers_of(entry) for entry in self.entries}
        for layer in (None, *range(self.layers)):
            for entry in self.entries:
                if layer in layers[id(entry)]:
                    for expert in range(self.experts) if entry.per_expert else (None,):
                        yield Place(entry, layer, expert)

    def tensors(self) -> dict[str, HFTensor]:
        """Every tensor of the checkpoint by its full name."""
        return {
            name: replace(tensor, name=name)
            for place in self.places()
            for name, tensor in zip(place.names, place.entry.hf, strict=True)
        }

    def renamed(self, start: str, new: str) -> "Table":
        """This table with Hugging Face names that begin with `new` instead of `start`; others stay."""

        def rename(name: str) -> str:
            return new + name.removeprefix(start) if name.startswith(start) else name

        entries = (
            replace(entry, hf=tuple(replace(tensor, name=rename(tensor.name)) for tensor in entry.hf))
            for entry in self.entries
        )
        stacked = (Stacked(rename(each.name), tuple(map(rename, each.pieces))) for each in self.stacked)
        return replace(self, entries=tuple(entries), stacked=tuple(stacked))

    def find(self, name: str) -> Place | None:
        """The place of a Megatron parameter, with the layer and expert numbers as in `name` (an expert's is
        local to its rank); None if no entry has it."""
        for pattern, entry in self._patterns:
            if found := pattern.fullmatch(name):
                numbers = {key: int(value) for key, value in found.groupdict().items()}
                return Place(entry, numbers.get("l"), numbers.get("e"))
        return None

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], Entry]]:
        return [(_pattern(name), entry) for entry in self.entries for name in entry.megatron]


def _pattern(name: str) -> re.Pattern[str]:
    escaped = re.escape(name)
    for key in "le":
        escaped = escaped.replace(re.escape(f"{{{key}}}"), rf"(?P<{key}>\d+)")
    return re.compile(escaped)


def parameters_of(table: Table) -> int:
    """Logical parameters of the table's model: each once, whatever the layout, without vocabulary padding."""
    return sum(
        math.prod(tensor.shape) * (table.experts if entry.per_expert else 1) * len(table.layers_of(entry))
        for entry in table.entries
        if entry.trained and not entry.copy
        for tensor in entry.hf
    )


def tensors_of(parameters: Iterable[tuple[Place, Tensors]]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every Hugging Face tensor that `parameters` (each as its full parts) hold, in their
    order. One parameter is in memory at a time; a tensor may share memory with it: copy it to keep it."""
    for place, parts in parameters:
        yield from zip(place.names, place.entry.from_parts(parts), strict=True)
        # Or it would still be held while the next is made.
        del parts
