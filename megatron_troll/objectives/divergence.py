"""Divergence of two token distributions, from the probabilities known of both (ALGORITHMS 6.1).

mu is the rollout or old policy, pi the current one. `binary` compares {sampled token, the rest}, `topk` {the
top-K of mu with the sampled token, one bucket for the rest}, without renormalisation. TV is half the L1
distance, KL is KL(mu || pi). Merging categories can only lower the divergence: binary <= topk <= full.
Sums run in float64, because 1 - sum of float32 probabilities is mostly rounding.
"""

from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"]
# Smallest probability of a rest bucket (DPPO's code).
FLOOR = 1e-12


def binary(log_mu: Tensor, log_pi: Tensor, kind: Divergence) -> Tensor:
    """[N] divergence from the log-probs [N] of the sampled token."""
    sampled = torch.ones_like(log_mu[:, None], dtype=torch.bool)
    return topk(log_mu[:, None], log_pi[:, None], sampled, vocab=2, kind=kind)


def topk(log_mu: Tensor, log_pi: Tensor, kept: Tensor, vocab: int, kind: Divergence) -> Tensor:
    """[N] divergence from log-probs [N, W] of both at the same ids, on the slots kept [N, W], out of `vocab`
    tokens. A kept token with pi = 0 has a TV like any other and an infinite KL."""
    mu, rest_mu = _with_rest(log_mu, kept, vocab)
    pi, rest_pi = _with_rest(log_pi, kept, vocab)
    if kind.endswith("tv"):
        distance = 0.5 * ((mu - pi).abs().sum(1) + (rest_mu - rest_pi).abs())
    else:
        terms = mu * (log_mu.double() - log_pi.double())
        distance = terms.where(mu > 0, 0.0).sum(1) + rest_mu * (rest_mu / rest_pi).log()
    # Rounding must not give two equal distributions a negative divergence.
    return distance.clamp(min=0.0).to(log_pi.dtype)


def _with_rest(logp: Tensor, kept: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """Probabilities [N, W] in float64, 0 on slots that are not kept, and the remaining mass [N]."""
    p = logp.double().exp().where(kept, 0.0)
    rest = (1.0 - p.sum(1)).where(kept.sum(1) < vocab, 0.0)
    return p, rest.clamp(min=FLOOR)
