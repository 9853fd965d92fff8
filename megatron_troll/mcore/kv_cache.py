"""Cache of sequences under way: keys and values, or the memories of linear attention."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass
class Prefix:
    """A prompt that was read once: by layer number, keys and values [g, P, d] after the rotary embedding, or
    a memory. `first`: the number of its first token among all that were read. `hidden` [h]: of its last
    position, on the last pipeline stage."""

    length: int
    first: int
    grown: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    fixed: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    hidden: Tensor | None = None


@dataclass
class KvCache:
    """The cache of up to `rows` sequences of up to `max_length` tokens. By layer number, `grown`: keys and
    values [rows, g, max_length, d]; `fixed`: memories, [rows, ...] each. A layer's tensors are made when it
    first keeps something. `fp8`: keys and values are rounded to float8_e4m3fn with scale 1."""

    rows: int
    max_length: int
    fp8: bool = False
    lengths: list[int] = field(default_factory=list)
    grown: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)
    fixed: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)

    def add(self, prefix: Prefix) -> None:
        """Start a row, after the others, behind a prefix."""
        row = len(self.lengths)
        self.lengths.append(prefix.length)
        for layer, tensors in prefix.grown.items():
            for whole, part in zip(self._of(self.grown, layer, tensors), tensors):
                whole[row, :, : prefix.length] = part
        for layer, tensors in prefix.fixed.items():
            for whole, part in zip(self._of(self.fixed, layer, tensors), tensors):
                whole[row] = part

    def _of(
        self, kept: dict[int, tuple[Tensor, ...]], layer: int, like: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if layer not in kept:
            shapes = [part.shape for part in like]
            if kept is self.grown:
                shapes = [(groups, self.max_length, width) for groups, _, width in shapes]
            kept[layer] = tuple(part.new_zeros(self.rows, *shape) for part, shape in zip(like, shapes))
        return kept[layer]

    def remove(self, row: int) -> None:
        """End a row: the last one takes its place."""
        last = self.lengths.pop()
        if row == len(self.lengths):
            return
        self.lengths[row] = last
        end = len(self.lengths)
        for tensors in self.grown.values():
            for whole in tensors:
                whole[row, :, :last] = whole[end, :, :last]
        for tensors in self.fixed.values():
            for whole in tensors:
                whole[row] = whole[end]


@dataclass(frozen=True)
class Extension:
    """One forward of generation: the tokens of `prompts`, one after another, and then one for each row of the
    cache. `lengths` [B]: those of the rows before it; `mask` [B, 1, 1, L]: True on the keys that a row
    sees."""

    cache: KvCache
    prompts: Sequence[Prefix]
    lengths: Tensor
    mask: Tensor

    @property
    def prompt_tokens(self) -> int:
        return sum(prefix.length for prefix in self.prompts)

    def stored(self, tensor: Tensor) -> Tensor:
        """Keys or values in the form in which the cache holds them."""
        return round_to_fp8(tensor) if self.cache.fp8 else tensor

    def keep(self, layer: int, *tensors: Tensor) -> None:
        """Keep the keys and values [t, g, d] of the prompts."""
        start = 0
        for prefix in self.prompts:
            end = start + prefix.length
            prefix.grown[layer] = tuple(tensor[start:end].transpose(0, 1) for tensor in tensors)
            start = end

    def extend(self, layer: int, *tensors: Tensor) -> list[Tensor]:
        """Append keys and values [B, g, d] to the rows; returns those of all positions [B, g, L, d]."""
        rows, longest = torch.arange(len(self.lengths), device=self.lengths.device), self.mask.shape[-1]
        for whole, new in zip(self.cache.grown[layer], tensors):
            whole[rows, :, self.lengths] = new
        return [whole[: len(rows), :, :longest] for whole in self.cache.grown[layer]]


def round_to_fp8(tensor: Tensor) -> Tensor:
    """Round to the nearest float8_e4m3fn values, saturating, in the tensor's own dtype. Idempotent."""
    return tensor.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(tensor.dtype)
