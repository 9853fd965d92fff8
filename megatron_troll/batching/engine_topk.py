"""The rollout engine's top-K as the record that objectives read."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_troll.types import NO_ID, Rollout, TopK


def engine_topk(rollouts: Sequence[Rollout], steps: Sequence[Tensor], k: int, vocab: int) -> TopK:
    """Log-probabilities of the sampling law as a TopK of W = k + 1 slots, lse = 0.

    `steps` names, per rollout, the response tokens wanted, N in all. At most the first k entries of each row
    are kept; the sampled token follows, with its own log-prob, where they lack it. Every rollout must have a
    record. Raises ValueError naming the sample where a kept entry is not finite.
    """
    ids = torch.full((sum(len(step) for step in steps), k + 1), NO_ID, dtype=torch.int64)
    logits = torch.full(ids.shape, -torch.inf, dtype=torch.float32)
    target, target_logp = ids.new_empty(len(ids)), logits.new_empty(len(ids))
    start = 0
    for rollout, step in zip(rollouts, steps):
        rows, tokens = slice(start, start + len(step)), step.numpy()
        row_ids, row_logp = _kept(rollout, tokens, k)
        ids[rows, : row_ids.shape[1]] = torch.from_numpy(row_ids).long()
        logits[rows, : row_ids.shape[1]] = torch.from_numpy(row_logp).float()
        target[rows] = torch.from_numpy(rollout.response_ids[tokens]).long()
        target_logp[rows] = torch.from_numpy(rollout.logp[tokens]).float()
        start += len(step)
    return _with_sampled(ids, logits, target, target_logp, vocab)


def _kept(rollout: Rollout, tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    assert rollout.topk is not None
    ids, logp = rollout.topk.ids[tokens, :k], rollout.topk.logp[tokens, :k]
    bad = np.argwhere((ids != NO_ID) & ~np.isfinite(logp))
    if bad.size:
        row, slot = bad[0]
        raise ValueError(
            f"sample {rollout.name}: engine top-K of response token {tokens[row]} gives id {ids[row, slot]} "
            f"the log-prob {logp[row, slot]}"
        )
    return ids, logp


def _with_sampled(ids: Tensor, logits: Tensor, target: Tensor, target_logp: Tensor, vocab: int) -> TopK:
    """Appends the sampled token to the rows that lack it. The last slot of `ids` [N, W] is free."""
    count = (ids != NO_ID).sum(1)
    found = ids == target[:, None]
    outside = ~found.any(1)
    place = torch.where(outside, count, found.int().argmax(1))
    ids[outside, count[outside]] = target[outside]
    logits[outside, count[outside]] = target_logp[outside]
    return TopK(ids, logits, count + outside, place, lse=torch.zeros(len(ids)), vocab=vocab)
