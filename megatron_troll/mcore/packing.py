"""Packed sequences as Megatron knows them, with the index lists that our core attention needs."""

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_troll.batching.context import zigzag
from megatron_troll.parallel.groups import Group


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length attended to as one dense batch of B; of equal length under context
    parallelism.

    query   [B, Lq] row of each query in this rank's flat [t] tokens, by position
    key     [B, Lk] row of each key in the flat tokens of all context-parallel ranks, by position
    used    [B, Lq] bool, False where a shorter sequence ends
    real    [B, Lk] bool, the same for keys
    """

    query: Tensor
    key: Tensor
    used: Tensor
    real: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's THD parameters plus the buckets of `buckets_of`."""

    buckets: tuple[Bucket, ...] = field(default=())


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int, cp: Group) -> PackedSequences:
    """THD parameters for padded sequence starts `cu_seqlens` [S + 1] int32, counted over all
    context-parallel ranks. Reads cu_seqlens on the host once."""
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        buckets=tuple(buckets_of(cu_seqlens.tolist(), cp, cu_seqlens.device)),
    )


def buckets_of(starts: list[int], cp: Group, device: torch.device) -> list[Bucket]:
    """Sequences grouped by the power of two above their length, so that padding to the longest of a
    bucket at most doubles it; under context parallelism by their length, which says where chunks begin."""
    groups: dict[int, list[int]] = {}
    for i, (start, end) in enumerate(pairwise(starts)):
        length = end - start
        if length:
            groups.setdefault((length - 1).bit_length() if cp.size == 1 else length, []).append(i)
    return [_bucket(starts, members, cp, device) for _, members in sorted(groups.items())]


def _bucket(starts: list[int], members: list[int], cp: Group, device: torch.device) -> Bucket:
    total = starts[-1]
    queries, keys = [], []
    for i in members:
        start, length = starts[i], starts[i + 1] - starts[i]
        queries.append(torch.arange(start // cp.size, start // cp.size + length // cp.size))
        key = torch.empty(length, dtype=torch.long)
        for rank in range(cp.size):
            theirs = zigzag(length, cp.size, rank)
            key[theirs] = (rank * total + start) // cp.size + torch.arange(len(theirs))
        keys.append(key)
    used, real = ([torch.ones(len(row), dtype=torch.bool) for row in rows] for rows in (queries, keys))
    return Bucket(*(_pad(rows).to(device) for rows in (queries, keys, used, real)))


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
