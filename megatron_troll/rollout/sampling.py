"""Sampling of tokens from log-probs, with one uniform number per token."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_troll.config import Sampling

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def sample_key(seed: int, round: int, prompt_id: str, sample: int) -> int:
    """64-bit key of one sample's random numbers."""
    text = f"{seed}/{round}/{prompt_id}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys: Sequence[int], position: int | Sequence[int]) -> np.ndarray:
    """One float64 in [0, 1) per key for token `position` of its answer, one for all or one each: the 53 high
    bits of output `position` of SplitMix64 (Steele, Lea, Flood 2014), seeded with the key."""
    with np.errstate(over="ignore"):
        steps = np.asarray(position, dtype=np.uint64) + np.uint64(1)
        z = np.asarray(keys, dtype=np.uint64) + steps * GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def token_uniforms(seed: int, round: int, prompt_id: str, sample: int, length: int) -> np.ndarray:
    """[length] float64 in [0, 1), one per token of a sample, independent of those that sampled its tokens."""
    key = sample_key(seed, round, f"mask {prompt_id}", sample)
    return np.concatenate([uniforms([key], position) for position in range(length)] or [np.empty(0)])


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
