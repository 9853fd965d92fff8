"""Functions by which objectives read sparse records (types.TopK). Nothing here holds N x V."""

import torch
from torch import Tensor

from megatron_troll.types import HeadOutputs, TopK


def record_of(topk: TopK | None, k: int, side: str, key: str) -> TopK:
    """The record of the `side` policy. Raises ValueError if it is missing or keeps fewer than k tokens
    besides the sampled one; the error names `key`, the slot that reads it."""
    hint = ": raise rollout.top_k" if side == "rollout" else ""
    if topk is None:
        raise ValueError(f"{key} reads the {side} policy's top-K record; none was given{hint}")
    kept = topk.ids.shape[1] - 1
    if kept < min(k, topk.vocab):
        raise ValueError(f"{key}.k: the {side} record keeps the top {kept} tokens; k={k} needs more{hint}")
    return topk


def at_rollout_of(readings: HeadOutputs, side: str, key: str) -> Tensor:
    """[N, W] log-probs of the `side` policy at the ids of the rollout engine's record."""
    if readings.at_rollout is None:
        raise ValueError(f"{key} reads the {side} policy at the rollout engine's ids; it was not read there")
    return readings.at_rollout


def first_slots(topk: TopK, k: int, union_sampled: bool) -> Tensor:
    """[N, W] bool: the first k kept slots, plus the sampled token's slot with `union_sampled`. The record may
    keep more than k."""
    slots = torch.arange(topk.ids.shape[1], device=topk.ids.device)
    wanted = (slots < k).expand(topk.ids.shape)
    if union_sampled:
        wanted = wanted | (slots == topk.place[:, None])
    return wanted & topk.valid


def log_probs(topk: TopK, side: str) -> Tensor:
    """[N, W] full-softmax log-probabilities, -inf on unused slots."""
    if topk.lse is None:
        raise ValueError(f"the {side} record has no logsumexp, and so no full-softmax log-probs")
    return (topk.logits - topk.lse[:, None]).to(topk.logits.dtype)


def at_sampled(values: Tensor, topk: TopK) -> Tensor:
    """[N] values [N, W] at the sampled token; -inf if it has no slot."""
    at = topk.place.clamp(min=0)[:, None]
    return torch.where(topk.place >= 0, values.gather(1, at)[:, 0], float("-inf"))
