"""Packed sequences in Megatron's format, with the index lists that our attention layers need."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_troll.batching.plan import zigzag
from megatron_troll.parallel.groups import Group


@dataclass(frozen=True)
class SequenceBucket:
    """Sequences of similar length (equal length under context parallelism) that attention processes as one
    dense batch of B.

    query   [B, Lq] row of each query in this rank's flat [t] tokens, by position
    key     [B, Lk] row of each key in the flat tokens of all context-parallel ranks, by position
    used    [B, Lq] bool, False after the end of a shorter sequence
    real    [B, Lk] bool, the same for keys
    """

    query: Tensor
    key: Tensor
    used: Tensor
    real: Tensor


@dataclass(frozen=True)
class Flat:
    """The non-empty sequences one after another, the input of variable-length kernels.

    key         [T] row of each position in the flat tokens of all context-parallel ranks
    sequence    [T] index of the sequence that each position belongs to
    starts      [S + 1] int64 start of each sequence, and the end of the last
    starts_cpu  the same on the host
    """

    key: Tensor
    sequence: Tensor
    starts: Tensor
    starts_cpu: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's THD parameters, with the sequences as dense batches (`buckets_of`) and flat (`flat_of`).

    position  [t] int64, index of each token inside its sequence, for the tokens of all context-parallel ranks
    """

    buckets: tuple[SequenceBucket, ...] = ()
    flat: Flat | None = None
    position: Tensor | None = None


def packed_sequences(cu_seqlens: Tensor, max_seqlen: int, cp: Group) -> PackedSequences:
    """THD parameters for padded sequence starts `cu_seqlens` [S + 1] int32, counted over all
    context-parallel ranks. Copies cu_seqlens to the host once."""
    starts, device = cu_seqlens.tolist(), cu_seqlens.device
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        buckets=tuple(buckets_of(starts, cp, device)),
        flat=flat_of(starts, cp, device),
        position=torch.cat([torch.arange(end - start) for start, end in pairwise(starts)]).to(device),
    )


def buckets_of(starts: list[int], cp: Group, device: torch.device) -> list[SequenceBucket]:
    """Sequences grouped by the power of two above their length, so that padding to the longest of a bucket
    at most doubles it; under context parallelism by exact length, which determines where chunks begin."""
    groups: dict[int, list[int]] = {}
    for i, (start, end) in enumerate(pairwise(starts)):
        length = end - start
        if length:
            groups.setdefault((length - 1).bit_length() if cp.size == 1 else length, []).append(i)
    return [_bucket(starts, members, cp, device) for _, members in sorted(groups.items())]


def _bucket(starts: list[int], members: list[int], cp: Group, device: torch.device) -> SequenceBucket:
    queries, keys = [], []
    for i in members:
        start, length = starts[i], starts[i + 1] - starts[i]
        queries.append(torch.arange(start // cp.size, start // cp.size + length // cp.size))
        keys.append(_keys(starts, i, cp))
    used, real = ([torch.ones(len(row), dtype=torch.bool) for row in rows] for rows in (queries, keys))
    return SequenceBucket(*(_pad(rows).to(device) for rows in (queries, keys, used, real)))


def flat_of(starts: list[int], cp: Group, device: torch.device) -> Flat:
    """The positions of all sequences, ordered by sequence and position."""
    members = [i for i, (start, end) in enumerate(pairwise(starts)) if end > start]
    keys = [_keys(starts, i, cp) for i in members]
    lengths = torch.tensor([len(key) for key in keys])
    starts_cpu = F.pad(lengths.cumsum(0), (1, 0))
    sequence = torch.arange(len(keys)).repeat_interleave(lengths)
    return Flat(torch.cat(keys).to(device), sequence.to(device), starts_cpu.to(device), starts_cpu)


def _keys(starts: list[int], i: int, cp: Group) -> Tensor:
    """[L] row of each position of sequence `i` in the flat tokens of all context-parallel ranks."""
    start, length = starts[i], starts[i + 1] - starts[i]
    key = torch.empty(length, dtype=torch.long)
    for rank in range(cp.size):
        theirs = zigzag(length, cp.size, rank)
        key[theirs] = (rank * starts[-1] + start) // cp.size + torch.arange(len(theirs))
    return key


def _pad(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
