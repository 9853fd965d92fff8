"""KL(new || reference) summed over a set S of kept tokens (ALGORITHMS 3.1). Nothing here holds N x V."""

import torch
from torch import Tensor

from megatron_troll.types import TopK


def first_slots(topk: TopK, k: int, union_sampled: bool) -> Tensor:
    """[N, W] bool: the first k kept slots, and with `union_sampled` that of the sampled token. The record
    may keep more than k."""
    slots = torch.arange(topk.ids.shape[1], device=topk.ids.device)
    wanted = (slots < k).expand(topk.ids.shape)
    if union_sampled:
        wanted = wanted | (slots == topk.place[:, None])
    return wanted & topk.valid


def log_probs(topk: TopK, side: str) -> Tensor:
    """[N, W] full-softmax log-probabilities, -inf on unused slots."""
    if topk.lse is None:
        raise ValueError(f"the {side} record has no logsumexp, and so no full-softmax log-probs")
    return topk.logits - topk.lse[:, None]


def at_sampled(values: Tensor, topk: TopK) -> Tensor:
    """values [N, W] at the sampled token; -inf where it has no slot."""
    at = topk.place.clamp(min=0)[:, None]
    return torch.where(topk.place >= 0, values.gather(1, at)[:, 0], float("-inf"))


def partial_kl(logp: Tensor, reference: Tensor, kept: Tensor, non_negative: bool) -> Tensor:
    """sum_S pi log(pi / ref) [N], or with `non_negative` sum_S (pi log(pi / ref) - pi + ref).

    logp, reference [N, W] log-probabilities, reference finite on S; kept [N, W] bool. Both are the KL where
    S is the whole vocabulary; the first can be negative where it is not. Differentiable in logp; a kept
    token with logp = -inf counts pi = 0 and has no gradient.
    """
    inside = kept & (logp != float("-inf"))
    log_p = torch.where(inside, logp, 0.0)
    log_ref = torch.where(inside, reference, 0.0)
    p = torch.where(inside, log_p.exp(), 0.0)
    total = (p * (log_p - log_ref)).sum(1)
    if not non_negative:
        return total
    return total - p.sum(1) + torch.where(kept, reference, float("-inf")).exp().sum(1)
