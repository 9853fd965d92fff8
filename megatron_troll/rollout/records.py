"""Answers as a few flat arrays; a batch's records of top-K and experts, sent to the ranks that read them.

Every rank holds what all ranks need of a batch: ids, log-probs, masks, texts, rewards. The records are larger
by far (8 bytes for each entry of the top-K of each token, and the experts of each token), and only the ranks
that train on a response read them: they stay on rank 0 until then (`Rollout.elsewhere`).
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np

from megatron_troll.parallel.groups import Arrays, Groups
from megatron_troll.rollout.engine import Completion
from megatron_troll.types import FinishReason, Rollout, TokenTopK

FINISHES: tuple[FinishReason, ...] = get_args(FinishReason)
Record = tuple[TokenTopK | None, np.ndarray | None]


def packed(answers: Sequence[Completion]) -> Arrays:
    """The answers without their records: 12 bytes a token, 9 an answer."""
    return {
        "lengths": np.array([len(answer.ids) for answer in answers], dtype=np.int64),
        "finish": np.array([FINISHES.index(answer.finish) for answer in answers], dtype=np.uint8),
        "ids": _joined([answer.ids for answer in answers], np.int32),
        "logp": _joined([answer.logp for answer in answers], np.float32),
        "versions": _joined([answer.versions for answer in answers], np.int32),
    }


def unpacked(arrays: Arrays) -> list[Completion]:
    """The answers of `packed`, views of its arrays."""
    ids, logp, versions = (_cut(arrays[name], arrays["lengths"]) for name in ("ids", "logp", "versions"))
    return [
        Completion(ids[i], logp[i], None, versions[i], FINISHES[finish])
        for i, finish in enumerate(arrays["finish"].tolist())
    ]


def packed_records(records: Sequence[Record]) -> Arrays:
    """Records, 8 bytes an entry and the experts as they are; rows: tokens of each, -1 for one that is None.
    Raises ValueError if K or the experts of a token differ in number."""
    found = [(topk.ids, topk.logp) for topk, _ in records if topk is not None]
    experts = [each for _, each in records if each is not None]
    arrays = {
        "topk_rows": np.array([-1 if topk is None else len(topk.ids) for topk, _ in records], np.int64),
        "experts_rows": np.array([-1 if each is None else len(each) for _, each in records], np.int64),
    }
    if found:
        ids, logp = zip(*found)
        arrays |= {"topk_ids": _joined(ids, np.int32), "topk_logp": _joined(logp, np.float32)}
    return arrays | ({"experts": np.concatenate(experts)} if experts else {})


def unpacked_records(arrays: Arrays) -> list[Record]:
    """The records of `packed_records`, views of its arrays."""
    rows = arrays["topk_rows"], arrays["experts_rows"]
    topk = _cut_found(arrays.get("topk_ids"), rows[0]), _cut_found(arrays.get("topk_logp"), rows[0])
    return [
        (None if ids is None or logp is None else TokenTopK(ids, logp), experts)
        for ids, logp, experts in zip(*topk, _cut_found(arrays.get("experts"), rows[1]), strict=True)
    ]


def _joined(parts: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.zeros(0, dtype)


def _cut(whole: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(whole, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _cut_found(whole: np.ndarray | None, rows: np.ndarray) -> list[np.ndarray | None]:
    if whole is None:
        return [None] * len(rows)
    found = iter(_cut(whole, rows[rows >= 0]))
    return [next(found) if count >= 0 else None for count in rows.tolist()]


def share_records(rollouts: Sequence[Rollout], wanted: Sequence[int], groups: Groups) -> list[Rollout]:
    """The rollouts, with the records of those at the indices `wanted`, which are the same on all ranks of a
    replica. Rank 0 sends each replica its share, one after the other, and its ranks pass it on; it holds one
    share besides the batch. Blocks on every rank of the world."""
    world, first = groups.world, groups.model.rank == 0 and groups.cp.rank == 0
    lacks = any(rollout.elsewhere for rollout in rollouts)
    asked = world.all_gather_objects((lacks, list(wanted) if first else None))
    if not any(lacking for lacking, _ in asked):
        return list(rollouts)
    if world.rank == 0:
        for rank, (_, share) in enumerate(asked):
            if rank > 0 and share is not None:
                world.send_arrays(_records_of(rollouts, share), rank)
        if groups.model.size == groups.cp.size == 1:
            return list(rollouts)
    arrays: Arrays | None = None
    if first:
        arrays = world.receive_arrays(0) if world.rank > 0 else _records_of(rollouts, wanted)
    if groups.model.rank == 0:
        arrays = groups.cp.broadcast_arrays(arrays, 0)
    arrays = groups.model.broadcast_arrays(arrays, 0)
    if world.rank == 0:
        return list(rollouts)
    held = dict(zip(wanted, unpacked_records(arrays), strict=True))
    return [
        replace(rollout, topk=held[i][0], experts=held[i][1], elsewhere=False) if i in held else rollout
        for i, rollout in enumerate(rollouts)
    ]


def _records_of(rollouts: Sequence[Rollout], chosen: Sequence[int]) -> Arrays:
    return packed_records([(rollouts[i].topk, rollouts[i].experts) for i in chosen])


def on_rank_0(answers: Sequence[Completion], groups: Groups, recorded: bool) -> list[Completion]:
    """All answers, of which each data-parallel rank drew `answers` (on its last stage, [] elsewhere), in rank
    order: on rank 0 with their records, if there are some (`recorded`), on others without. Blocks on every
    rank of the world."""
    world, dp = groups.world, groups.dp
    shares = _everywhere(answers, groups)
    if not recorded:
        return [answer for share in shares for answer in share]
    drew = groups.is_last_stage and groups.tp.rank == groups.cp.rank == 0
    sources = {share: rank for rank, share in enumerate(world.all_gather_objects(dp.rank if drew else -1))}
    if world.rank > 0 and drew:
        world.send_arrays(packed_records([(answer.topk, answer.experts) for answer in answers]), 0)
    if world.rank == 0:
        for share in range(dp.size):
            if sources[share] == 0:
                shares[share] = list(answers)
                continue
            records = unpacked_records(world.receive_arrays(sources[share]))
            shares[share] = [
                replace(answer, topk=topk, experts=experts)
                for answer, (topk, experts) in zip(shares[share], records, strict=True)
            ]
    return [answer for share in shares for answer in share]


def _everywhere(answers: Sequence[Completion], groups: Groups) -> list[list[Completion]]:
    """The answers of each data-parallel rank, without their records, on every rank. Blocks."""
    dp, pp = groups.dp, groups.pp
    mine = pp.broadcast_arrays(packed(answers) if groups.is_last_stage else None, pp.size - 1)
    return [unpacked(dp.broadcast_arrays(mine if rank == dp.rank else None, rank)) for rank in range(dp.size)]
