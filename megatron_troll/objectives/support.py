"""Cut, compare and describe (for the log) the supports of sparse records (ALGORITHMS 1.1, 1.9)."""

from dataclasses import replace

import torch
from torch import Tensor
from troll_kernels.sparsify import in_prefix, select

from megatron_troll.objectives.slots import Diagnostics, refuse_rows
from megatron_troll.types import TopK

# Rounding allowed in a mass that is summed from float32 logits.
MASS_ROUNDING = 1e-6

DIAGNOSTICS: Diagnostics = {
    "kept_old": ("mean", "p99", "max"),
    "kept_new": ("mean", "p99", "max"),
    "covered_old": ("mean", "min"),
    "covered_new": ("mean", "min"),
    "k_bound_old": ("mean",),
    "k_bound_new": ("mean",),
    "sampled_outside_old": ("mean",),
    "sampled_outside_new": ("mean",),
    "sampled_impossible": ("mean",),
    "support_jaccard": ("mean", "min"),
    "one_token_support": ("mean",),
}


def cut(topk: TopK, k: int, delta: float) -> TopK:
    """The record [N, W] as selection with (k, delta) would have made it, W = min(k, V) + 1.

    Raises ValueError if the record keeps fewer tokens than (k, delta) asks for: its own K was smaller
    or its own delta larger. Waits for the device.
    """
    width = min(k, topk.vocab)
    stored = topk.ids.shape[1] - 1
    if stored < width:
        raise ValueError(f"the record keeps the top {stored} tokens; k={k} needs {width} of them")
    if topk.lse is None:
        raise ValueError("a record without its logsumexp cannot be cut by mass")
    at = topk.place.clamp(min=0)[:, None]
    target = torch.where(topk.place >= 0, topk.ids.gather(1, at)[:, 0], -1)
    target_logit = torch.where(topk.place >= 0, topk.logits.gather(1, at)[:, 0], float("-inf"))
    values, ids = topk.logits[:, :width], topk.ids[:, :width]
    prefix = in_prefix(values, topk.lse, delta)
    mass = _mass(values, topk.lse).where(prefix, 0.0).sum(1)
    short = (prefix.sum(1) < width) & (mass < 1.0 - delta - MASS_ROUNDING)
    refuse_rows(short, f"the record keeps fewer tokens than k={k}, delta={delta:g} needs")
    ids, logits, count, place = select(values, ids, topk.lse, target, target_logit, delta)
    return replace(topk, ids=ids, logits=logits, count=count, place=place)


def compare(old: TopK, new: TopK, outside: Tensor) -> dict[str, Tensor]:
    """Sizes and overlap of two supports; outside [N] counts the tokens in neither."""
    dtype = outside.dtype
    kept_old = old.valid.sum(1).to(dtype)
    kept_new = (new.valid & (new.logits != float("-inf"))).sum(1).to(dtype)
    union = new.vocab - outside
    at = new.place.clamp(min=0)[:, None]
    impossible = (new.place < 0) | (new.logits.gather(1, at)[:, 0] == float("-inf"))
    per_token = {
        "kept_old": kept_old,
        "kept_new": kept_new,
        "support_jaccard": (kept_old + kept_new - union) / union,
        "sampled_impossible": impossible.to(dtype),
        "one_token_support": (kept_new == 1).to(dtype),
    }
    for side, topk in (("old", old), ("new", new)):
        if topk.lse is not None:
            per_token[f"covered_{side}"] = (
                _mass(topk.logits, topk.lse).where(topk.valid, 0.0).sum(1).to(dtype)
            )
    return per_token


def describe(topk: TopK, k: int, delta: float, side: str) -> dict[str, Tensor]:
    """Whether k, not delta, ended the top-K prefix, and whether the sampled token was outside it. Needs the
    slots in order of value, as selection returns them. {} without a logsumexp."""
    if topk.lse is None:
        return {}
    values = topk.logits.detach()[:, :k]
    prefix = in_prefix(values, topk.lse, delta)
    length = prefix.sum(1)
    mass = _mass(values, topk.lse).where(prefix, 0.0).sum(1)
    dtype = topk.logits.dtype
    return {
        f"k_bound_{side}": ((length == k) & (mass < 1.0 - delta)).to(dtype),
        f"sampled_outside_{side}": ((topk.place < 0) | (topk.place >= length)).to(dtype),
    }


def _mass(logits: Tensor, lse: Tensor) -> Tensor:
    """Full-softmax probabilities [N, W] in float64."""
    return (logits.detach().double() - lse.detach().double()[:, None]).exp()
