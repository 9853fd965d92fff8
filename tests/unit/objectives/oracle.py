"""The TROLL objective over the whole vocabulary by autograd, in float64: no slots, no closed-form gradient.

Written from arXiv 2510.03817 (eq. 3, 5, 21): p' is a dense [N, V] tensor, eta comes from bisection, and its
derivative from the implicit function theorem.
"""

import torch
from torch import Tensor


def dense_sparsified(logits: Tensor, ids: Tensor, kept: Tensor, p_d: float) -> Tensor:
    """p' [N, V] of eq. 21 through the full softmax; ids [N, W], kept [N, W] bool."""
    inside = torch.zeros_like(logits, dtype=torch.bool)
    inside = inside.scatter(1, torch.where(kept, ids, ids[:, :1]), True)
    p = logits.softmax(1)
    gamma = (1 - (~inside).double().sum(1, keepdim=True) * p_d) / (p * inside).sum(1, keepdim=True)
    return torch.where(inside, gamma * p, p_d)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1)


def projected(p: Tensor, q: Tensor, bound: float) -> Tensor:
    """pi [N, V] with KL(pi || q) <= bound, differentiable in p; rows inside the bound stay p."""
    active = kl(p, q).detach() > bound
    return p.index_put((active,), _onto_bound(p[active], q[active], bound))


def _onto_bound(p: Tensor, q: Tensor, bound: float) -> Tensor:
    """pi [N, V] with KL(pi || q) = bound < KL(p || q)."""

    log_p, log_q = p.log(), q.log()

    def at(eta: Tensor) -> Tensor:
        return ((eta[:, None] * log_q + log_p) / (eta[:, None] + 1)).softmax(1)

    lo = torch.zeros(len(p), dtype=p.dtype)
    hi = torch.full_like(lo, 1e9)
    with torch.no_grad():
        for _ in range(100):
            eta = (lo + hi) / 2
            over = kl(at(eta), q) > bound
            lo, hi = torch.where(over, eta, lo), torch.where(over, hi, eta)
    eta = hi.clone().requires_grad_()
    (slope,) = torch.autograd.grad(kl(at(eta), q.detach()).sum(), eta)
    return at(hi - (kl(at(hi), q) - bound) / slope.detach())


def troll(p: Tensor, q: Tensor, target: Tensor, advantage: Tensor, bound: float, alpha: float) -> Tensor:
    """J [N] of eq. 5."""
    pi = projected(p, q, bound)
    at = target[:, None]
    ratio = (pi.gather(1, at) / q.gather(1, at))[:, 0]
    return ratio * advantage - alpha * kl(p, pi.detach())
