"""KL(new || reference) summed over a set S of kept tokens (ALGORITHMS 3.1). Nothing here holds N x V."""

import torch
from torch import Tensor


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
    terms = p * (log_p - log_ref)
    if non_negative:
        terms = terms - p + torch.where(kept, reference, float("-inf")).exp()
    return terms.sum(1)
