"""Checkpoints of parameters whose shards are pieces of several matrices."""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ReplicaId, ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megatron_troll.parallel.groups import Group


def cut_rows(
    key: str, parameter: Tensor, kinds: dict[str, int], tp: Group, replica: ReplicaId
) -> ShardedTensorFactory:
    """`parameter` as the tensors `key`.<kind>, of which it holds, one below the other, this rank's `kinds`
    rows each. For an optimizer's state of the same shape too."""

    def build(key: str, tensor: Tensor, replica: ReplicaId, flattened_range: slice | None) -> Any:
        assert flattened_range is None
        pieces = tensor.split(list(kinds.values()))
        return [
            ShardedTensor.from_rank_offsets(f"{key}.{kind}", piece, (0, tp.rank, tp.size), replica_id=replica)
            for kind, piece in zip(kinds, pieces, strict=True)
        ]

    def merge(pieces: Any) -> Tensor:
        return torch.cat(pieces)

    return ShardedTensorFactory(key, parameter, build, merge, replica)
