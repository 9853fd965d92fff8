"""Drawing tokens from logits by one uniform number each."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_troll.config.tree import Sampling

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def sample_key(seed: int, round: int, prompt_id: str, sample: int) -> int:
    """64-bit key of one sample's random numbers."""
    text = f"{seed}/{round}/{prompt_id}/{sample}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def uniforms(keys: Sequence[int], position: int) -> np.ndarray:
    """One float64 in [0, 1) per key for token `position` of its answer: SplitMix64 (Steele, Lea, Flood 2014)
    of key + position steps, its 53 high bits."""
    with np.errstate(over="ignore"):
        z = np.asarray(keys, dtype=np.uint64) + np.uint64(position + 1) * GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """A token per row of logits [B, V] (raw, fp32) by the inverse of the cumulative distribution in id order.

    Returns token ids [B] and their log-probabilities [B] after temperature and before top-p, top-k and min-p,
    as SGLang gives them; temperature 0 takes the largest logit (lowest id on ties) and reports temperature 1.
    uniform [B] float64. Holds B x V in float64.
    """
    if sampling.temperature == 0:
        token = logits.argmax(-1)
    else:
        logits = logits / sampling.temperature
        cumulative = keep(logits, sampling).double().cumsum(-1)
        threshold = (uniform * cumulative[:, -1])[:, None]
        token = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    logp = torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0]
    return token, logp


def keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [B, V] (unnormalised) of the tokens that top-k, top-p and min-p keep, 0 elsewhere.
    Each filter reads the full distribution after temperature. At least one token is kept."""
    probs = logits.softmax(-1)
    kept = torch.ones_like(probs, dtype=torch.bool)
    if sampling.min_p > 0:
        kept &= probs >= sampling.min_p * probs.amax(-1, keepdim=True)
    if sampling.top_k or sampling.top_p < 1:
        ordered, ids = probs.sort(-1, descending=True, stable=True)
        first = torch.ones_like(kept)
        if sampling.top_k:
            first[:, sampling.top_k :] = False
        if sampling.top_p < 1:
            first &= ordered.cumsum(-1) - ordered < sampling.top_p
        kept &= torch.zeros_like(kept).scatter(1, ids, first)
    return probs * kept
