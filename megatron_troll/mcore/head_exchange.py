"""Heads for positions: an all-to-all over context-parallel ranks, for what must see every position."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor

from megatron_troll.batching.context import zigzag
from megatron_troll.parallel.groups import Group


@dataclass(frozen=True)
class HeadExchange:
    """Between "my positions of every head" and "every position of my heads", a rank's heads being its equal
    share of each kind. Without context parallelism nothing moves."""

    cp: Group

    def to_heads(self, kinds: Sequence[Tensor]) -> Tensor:
        """Tensors [s, b, w_i], heads along w_i -> [cp x s, b, sum(w_i) / cp], the positions of each rank
        together. Blocks."""
        shares = [torch.cat([self.share(kind, rank) for kind in kinds], -1) for rank in range(self.cp.size)]
        return shares[0] if self.cp.size == 1 else self._swap(torch.cat(shares))

    def to_positions(self, mixed: Tensor) -> Tensor:
        """[cp x s, b, w / cp] -> [s, b, w]. Blocks."""
        return mixed if self.cp.size == 1 else torch.cat(self._swap(mixed).chunk(self.cp.size), -1)

    def share(self, tensor: Tensor, rank: int | None = None) -> Tensor:
        """The heads, along the last axis, of one rank (default: this one)."""
        return tensor.chunk(self.cp.size, -1)[self.cp.rank if rank is None else rank]

    def order(self, positions: int, device: torch.device) -> Tensor:
        """[cp x s] which position of a whole, unpacked sequence each row of `to_heads` is."""
        ranks = range(self.cp.size)
        return torch.cat([zigzag(positions, self.cp.size, rank) for rank in ranks]).to(device)

    def _swap(self, tensor: Tensor) -> Tensor:
        swapped: Any = all_to_all(self.cp.handle, tensor)
        return swapped
