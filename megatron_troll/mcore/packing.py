"""Packed sequences in Megatron's format, with the index lists that our attention layers need."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_troll.batching.plan import zigzag
from megatron_troll.mcore.kv_cache import Extension, KvCache, Prefix
from megatron_troll.mcore.tree_attention import AttentionPart, block_mask, last_readers, parts_of
from megatron_troll.parallel.groups import ALONE, Group
from megatron_troll.types import PackedTree

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


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


@dataclass(frozen=True)
class Continued:
    """Sequences of similar length that a recurrent layer processes as one dense batch of B, after those that
    they continue. Memories are numbered in the order in which they are kept; number 0 is the empty one.

    members index of each sequence
    key     [B, L] row of each position in the flat tokens of all context-parallel ranks
    length  [B] positions without padding
    before  [B] number of the memory that each sequence continues
    kept    indices of the sequences whose memory is kept
    """

    members: tuple[int, ...]
    key: Tensor
    length: Tensor
    before: Tensor
    kept: Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's THD parameters, with what our layers need: the sequences as dense batches (`buckets_of`) and
    flat (`flat_of`) or, if they continue one another, the parts of their attention (on a GPU its mask) and
    batches for recurrent layers; in a forward of generation, what it does.

    position  [t] int64, position of each token in its rollout, for the tokens of all context-parallel ranks
    """

    buckets: tuple[SequenceBucket, ...] = ()
    flat: Flat | None = None
    position: Tensor | None = None
    parts: tuple[AttentionPart, ...] = ()
    mask: "BlockMask | None" = None
    continued: tuple[Continued, ...] = ()
    generation: Extension | None = None


def packed_sequences(
    cu_seqlens: Tensor, max_seqlen: int, cp: Group, tree: PackedTree | None = None
) -> PackedSequences:
    """THD parameters for padded sequence starts `cu_seqlens` [S + 1] int32, counted over all
    context-parallel ranks. Copies cu_seqlens to the host once. Raises ValueError for a tree on a GPU under
    context parallelism."""
    starts, device = cu_seqlens.tolist(), cu_seqlens.device
    first = [0] * (len(starts) - 1) if tree is None else tree.start
    position = [at + torch.arange(end - start) for at, (start, end) in zip(first, pairwise(starts))]
    layout: dict[str, Any] = {"position": torch.cat(position).to(device)}
    if tree is None:
        layout |= {"buckets": tuple(buckets_of(starts, cp, device)), "flat": flat_of(starts, cp, device)}
    else:
        keys = [_keys(starts, i, cp) for i in range(len(starts) - 1)]
        layout["continued"] = tuple(continued_of(tree, keys, device))
        if device.type == "cuda":
            if cp.size > 1:
                raise ValueError("shared prefixes under context parallelism need a CPU")
            layout["mask"] = block_mask(last_readers(tree, starts).to(device))
        else:
            layout["parts"] = tuple(parts_of(tree, starts, keys, buckets_of(starts, cp, device), cp))
    return _thd(cu_seqlens, max_seqlen, **layout)


def _thd(cu_seqlens: Tensor, longest: int, **layout: Any) -> PackedSequences:
    """Megatron's parameters, the same for queries and keys, and the fields that are ours."""
    return PackedSequences(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        cu_seqlens_q_padded=cu_seqlens,
        cu_seqlens_kv_padded=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **layout,
    )


def generating(cache: KvCache, prompts: Sequence[Prefix], device: torch.device) -> PackedSequences:
    """Pack the tokens of `prompts` end to end, and then one token of each row of `cache`, which goes on where
    its row ends."""
    lengths = [prefix.length for prefix in prompts]
    starts = np.cumsum([0, *lengths]).tolist()
    sizes = [*lengths, *([1] * len(cache.lengths))]
    cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).int().to(device)
    position = torch.cat([*map(torch.arange, lengths), torch.tensor(cache.lengths, dtype=torch.int64)])
    longest = max([*lengths, *(length + 1 for length in cache.lengths)])
    before = torch.tensor(cache.lengths, dtype=torch.int64, device=device)
    seen = torch.arange(max(cache.lengths, default=0) + 1, device=device) <= before[:, None]
    alone = PackedTree((-1,) * len(lengths), (0,) * len(lengths), tuple(lengths))
    keys = [_keys(starts, i, ALONE) for i in range(len(lengths))]
    return _thd(
        cu_seqlens,
        longest,
        buckets=tuple(buckets_of(starts, ALONE, device)),
        position=position.to(device),
        continued=tuple(continued_of(alone, keys, device)),
        generation=Extension(cache, prompts, before, seen[:, None, None]),
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


def continued_of(tree: PackedTree, keys: Sequence[Tensor], device: torch.device) -> list[Continued]:
    """The sequences grouped by depth in the tree and the power of two above their length."""
    depth = [0] * len(keys)
    for i, parent in enumerate(tree.parent):
        depth[i] = 0 if parent == -1 else depth[parent] + 1
    groups: dict[tuple[int, int], list[int]] = {}
    for i, length in enumerate(tree.length):
        if length:
            groups.setdefault((depth[i], (length - 1).bit_length()), []).append(i)
    parents, number, batches = set(tree.parent), {-1: 0}, []
    for _, members in sorted(groups.items()):
        kept = [at for at, i in enumerate(members) if i in parents]
        before = [number[tree.parent[i]] for i in members]
        number |= {members[at]: len(number) + n for n, at in enumerate(kept)}
        lengths = [tree.length[i] for i in members]
        key = _pad([keys[i][:length] for i, length in zip(members, lengths)])
        columns = (torch.tensor(column, dtype=torch.int64) for column in (lengths, before, kept))
        batches.append(Continued(tuple(members), *(column.to(device) for column in (key, *columns))))
    return batches


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
