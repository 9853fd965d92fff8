"""Logsumexp and top-K of full rows of logits, without gradient, for the selection of `support: own`."""

from typing import NamedTuple

import torch
from torch import Tensor

from troll_kernels.head.shard import Shard
from troll_kernels.rows import row_statistics
from troll_kernels.tiles import tile_size
from troll_kernels.topk import top_k


class Candidates(NamedTuple):
    """Statistics and top-K of N rows of this shard; see `rows.RowStatistics` and `topk.top_k`.

    lse [N] float64 and mean [N] of the transformed logits; target [N] raw; values [N, K] raw, columns [N, K].
    For 16-bit weights, values and target are rounded to the dtype of the GEMM's output: precise enough for
    selection, but ratios of two policies need `logits_at`.
    """

    lse: Tensor
    mean: Tensor
    target: Tensor
    values: Tensor
    columns: Tensor


@torch.no_grad()
def candidates(hidden: Tensor, weight: Tensor, target: Tensor, k: int, shard: Shard) -> Candidates:
    """Compute statistics and top-k of every row.

    hidden [N, H], weight [V_local, H] of one dtype, target [N] int64 column, outside [0, V_local) if another
    shard holds it. Holds chunk x V_local logits, on CPU three times."""
    tile = tile_size(shard.width, k)
    parts = []
    for rows, logits in shard.chunks(hidden, weight):
        statistics = row_statistics(logits, shard.width, target[rows], shard.transform, tile)
        parts.append((*statistics[:3], *top_k(logits, statistics.tile_max, shard.width, k, tile)))
    if not parts:
        return _of_no_rows(hidden, k)
    return Candidates(*(torch.cat(part) for part in zip(*parts)))


def _of_no_rows(hidden: Tensor, k: int) -> Candidates:
    none = hidden.new_empty(0)
    return Candidates(
        none.double(), none, none, none.new_empty(0, k), none.new_empty(0, k, dtype=torch.int64)
    )
