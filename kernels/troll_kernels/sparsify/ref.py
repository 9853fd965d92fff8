"""Sparsification of a token distribution (arXiv 2510.03817, eq. 21; ALGORITHMS 1.1).

N positions, K candidates each, W = K + 1 slots: the extra slot is for the sampled token.
Nothing here holds N x V.
"""

import torch
from torch import Tensor

NO_ID = -1
LOWEST = float("-inf")


def in_prefix(values: Tensor, lse: Tensor, delta: float) -> Tensor:
    """Mask of candidates kept by the 1 - delta rule: the shortest prefix with that much full-softmax mass.

    values [N, K] logits, descending, -inf on padding; lse [N] logsumexp over the full vocabulary,
    float64: see rows.RowStatistics. Returns [N, K] bool. -inf is never kept. The mass is summed in float64,
    because float32 sums move entries across the threshold. NaN is kept, so that it reaches the loss.
    """
    mass = (values.detach().double() - lse.detach().double()[:, None]).exp()
    before = mass.cumsum(1) - mass
    return (values != LOWEST) & ~(before >= 1.0 - delta)


def select(
    values: Tensor, ids: Tensor, lse: Tensor, target: Tensor, target_logit: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The support S of each position: its 1 - delta prefix, then the sampled token if the prefix lacks it.

    values [N, K], ids [N, K] top-K logits and ids, value descending then id ascending; columns past
    the vocabulary hold -inf and NO_ID. lse, target, target_logit [N].

    Returns ids [N, W], logits [N, W] (differentiable in values and target_logit; the selection is
    not), count [N], and place [N]: the slot of the sampled token, NO_ID if its logit is -inf and it
    stays outside S. Unused slots hold NO_ID and -inf.
    """
    prefix = in_prefix(values, lse, delta)
    length = prefix.sum(1)
    hit = prefix & (ids == target[:, None])
    found = hit.any(1)
    append = ~found & (target_logit != LOWEST)
    # Rows that append nothing write padding into the last slot, which is padding already.
    slot = torch.where(append, length, values.shape[1])[:, None]
    out_ids = _with_slot(torch.where(prefix, ids, NO_ID), slot, torch.where(append, target, NO_ID), NO_ID)
    kept = torch.where(prefix, values, LOWEST)
    logits = _with_slot(kept, slot, torch.where(append, target_logit, LOWEST), LOWEST)
    place = torch.where(found, hit.int().argmax(1), torch.where(append, length, NO_ID))
    return out_ids, logits, length + append, place


def _with_slot(rows: Tensor, slot: Tensor, value: Tensor, padding: float) -> Tensor:
    """Append a column of `padding` to rows [N, K], and write value [N] at slot [N, 1]."""
    widened = torch.cat((rows, rows.new_full((rows.shape[0], 1), padding)), dim=1)
    return widened.scatter(1, slot, value.to(rows.dtype)[:, None])


def sparse_logp(logits: Tensor, count: Tensor, vocab: int, p_d: float) -> Tensor:
    """log p' of eq. 21 on the support: log(1 - (V - |S|) p_d) + log_softmax over S.

    logits [N, W], count [N]: slots past `count`, and slots with a -inf logit, are outside S; their
    tokens have p' = p_d and their entry here is -inf. Differentiable in logits.
    Raises ValueError if (V - |S|) p_d >= 1: no mass would be left for the support.
    """
    check_default(logits, count, vocab, p_d)
    kept = _kept(logits, count)
    inside = torch.log1p(-(vocab - kept.sum(1)).double() * p_d).to(logits.dtype)
    logp = torch.log_softmax(torch.where(kept, logits, LOWEST), dim=1)
    return logp + inside[:, None]


def check_default(logits: Tensor, count: Tensor, vocab: int, p_d: float) -> None:
    """Raise the ValueError documented in `sparse_logp`. Only a very large p_d can fail, so the usual call
    never waits for the device."""
    if (vocab - 1) * p_d < 1:
        return
    outside = (vocab - _kept(logits, count).sum(1)).double()
    if bool((outside * p_d >= 1).any()):
        raise ValueError(f"(V - |S|) * p_d >= 1 with V={vocab}, p_d={p_d}: choose a smaller p_d")


def _kept(logits: Tensor, count: Tensor) -> Tensor:
    slots = torch.arange(logits.shape[1], device=logits.device)
    return (slots < count[:, None]) & (logits != LOWEST)
