"""Sampling of tokens from log-probs, with one uniform number per token."""

import hashlib

import torch
from torch import Tensor

from megatron_troll.config import Sampling


def sample_key(seed: int, round: int, prompt_id: str, sample: int) -> int:
    """64-bit key of one sample's random numbers."""
    text = f"{seed}/{round}/{prompt_id}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mask_key(seed: int, round: int, prompt_id: str, sample: int) -> int:
    """`Rollout.key`: the key of random numbers independent of those that sampled the tokens."""
    return sample_key(seed, round, f"mask {prompt_id}", sample)


def sample(logp: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Sample one token per row, [B], from log-probs logp [B, V] after temperature: invert the cumulative
    distribution, in id order, of the tokens that the filters of `sampling` keep. Temperature 0 takes the
    largest log-prob, on ties the lowest id.

    uniform [B] float64 in [0, 1). A row that contains NaN gives some valid token. Holds B x V in float64.
    """
    if sampling.temperature == 0:
        return logp.argmax(-1)
    cumulative = keep(logp.exp(), sampling).cumsum(-1, dtype=torch.float64)
    threshold = (uniform * cumulative[:, -1])[:, None]
    # The first id whose cumulative probability exceeds the threshold; it exists: uniform * total < total.
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp_(max=logp.shape[1] - 1)


def keep(probs: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] of the tokens that top-k, top-p and min-p keep, 0 elsewhere, not renormalised.
    Each filter reads the full distribution `probs`; ties: the lower id first. At least one token is kept."""
    if sampling.min_p > 0:
        floor = sampling.min_p * probs.amax(-1, keepdim=True)
        probs = torch.where(probs >= floor, probs, 0.0)
    if sampling.top_k or sampling.top_p < 1:
        probs = probs * _first(probs, sampling)
    return probs


def _first(probs: Tensor, sampling: Sampling) -> Tensor:
    """[B, V] bool: the `top_k` largest, and of these only tokens preceded by less than the mass `top_p`."""
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    kept = torch.ones_like(probs, dtype=torch.bool)
    if sampling.top_k:
        kept[:, sampling.top_k :] = False
    if sampling.top_p < 1:
        before = ordered.double().cumsum(-1) - ordered
        kept &= before < sampling.top_p
    return torch.zeros_like(kept).scatter(1, ids, kept)
