"""Keys and regions of the parameters in a Megatron checkpoint (torch_dist), the same for every layout.

A checkpoint holds whole tensors by key. Megatron stacks what repeats: `decoder.layers.mlp.router.weight` is
[layers, experts, hidden], `decoder.layers.mlp.experts.experts.linear_fc1.weight` [layers, experts, 2 x ffn,
hidden] with the gate above the up projection. Layers that differ in kind have keys of their own
(`decoder.layers.3.mlp...`), and so have the parts of Gated DeltaNet's projections. The keys are those of
Transformer Engine's layers, which Megatron-LM writes as well.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from megatron_troll.weights.table import Place, Table

Size = tuple[int, ...]

LAYER = "decoder.layers.{l}."
FUSED_NORM = "layer_norm_weight"
# A model has one layer per expert, or one for all; the keys in the checkpoint are the same.
EXPERT = re.compile(r"\.experts\.(?:local_experts\.\{e\}\.)?(\w+\.\w+?)(?:\{e\})?$")
# Parameters whose parts have a key each (mcore/gated_delta_net.py).
PARTS = {
    LAYER + "self_attention.in_proj.weight": ("query", "key", "value", "z", "b", "a"),
    LAYER + "self_attention.conv1d.weight": ("query", "key", "value"),
    LAYER + "self_attention.dt_bias": ("heads",),
    LAYER + "self_attention.A_log": ("heads",),
}


@dataclass(frozen=True)
class Region:
    """Block of the tensor `key`, of shape `whole`, that holds one part of a parameter: it begins at `start`
    and has shape `shape`. Stacked layers and experts are leading axes, of length 1 in `shape`."""

    key: str
    whole: Size
    start: Size
    shape: Size


@dataclass(frozen=True)
class Keys:
    """The keys of one checkpoint. `stacked`: whether the layers are an axis; `prefix` begins every key."""

    table: Table
    stacked: bool
    prefix: str = ""

    def regions(self, place: Place) -> tuple[Region, ...]:
        """The regions to which the parts of a parameter are written."""
        return next(self.candidates(place))

    def candidates(self, place: Place) -> Iterator[tuple[Region, ...]]:
        """The regions to read them from: the keys of Transformer Engine's layers, then of local ones."""
        kind = None if place.layer is None else self.table.layer_types[place.layer]
        for name in reversed(place.entry.megatron):
            # Transformer Engine keeps a norm in the linear layer that follows it, if there is one.
            if not name.endswith(FUSED_NORM) or name.replace(FUSED_NORM, "weight") in self._names[kind]:
                yield tuple(self._regions(place, name))

    @cached_property
    def _names(self) -> dict[str | None, set[str]]:
        """The Megatron names that layers of each type have."""
        names: dict[str | None, set[str]] = {kind: set() for kind in (None, *self.table.layer_types)}
        for entry in self.table.entries:
            for kind in names if entry.layer_type is None else (entry.layer_type,):
                names[kind] |= set(entry.megatron)
        return names

    def _regions(self, place: Place, name: str) -> Iterator[Region]:
        start, stack = self._stacks(place)
        key = self.prefix + self._key(place, name)
        shapes, axis = place.entry.part_shapes, place.entry.axis or 0
        if name in PARTS:
            for part, shape in zip(PARTS[name], shapes, strict=True):
                yield _region(f"{key}.{part}", (start, stack), (0,) * len(shape), shape, shape)
            return
        rows = [shape[axis] for shape in shapes]
        for i, shape in enumerate(shapes):
            begin = [0] * len(shape)
            begin[axis] = sum(rows[:i])
            whole = [*shape[:axis], sum(rows), *shape[axis + 1 :]]
            yield _region(key, (start, stack), tuple(begin), shape, tuple(whole))

    def _key(self, place: Place, name: str) -> str:
        if place.expert is not None:
            name = EXPERT.sub(r".experts.experts.\1", name)
        return name.replace("{l}.", "") if self.stacked else name.format(l=place.layer)

    def _stacks(self, place: Place) -> tuple[Size, Size]:
        """The index of `place` on each leading axis, and the lengths of these axes."""
        axes = []
        if self.stacked and place.layer is not None:
            axes.append((place.layer, self.table.layers))
        if place.expert is not None:
            axes.append((place.expert, self.table.experts))
        return tuple(at for at, _ in axes), tuple(length for _, length in axes)


def _region(key: str, stacks: tuple[Size, Size], begin: Size, shape: Size, whole: Size) -> Region:
    start, stack = stacks
    return Region(key, (*stack, *whole), (*start, *begin), (*(1 for _ in start), *shape))


def written_keys(table: Table) -> Keys:
    """The keys that Megatron writes for a model: its layers are stacked if all are of one kind."""
    return Keys(table, stacked=all(entry.layer_type is None for entry in table.entries))
