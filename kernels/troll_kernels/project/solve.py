"""The step length tau of the projection: the root of KL(pi_tau || old) = bound (ALGORITHMS 1.3, 1.4).

pi_tau is proportional to old^(1 - tau) new^tau, so tau = 1/(1 + eta) runs from old (0) to new (1).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from troll_kernels.project.pair import Pair

MAX_PASSES = 20
MIN_VARIANCE = 1e-30


class Precision(NamedTuple):
    """Relative tolerances at which Newton stops: in KL and in bracket width."""

    kl: float
    bracket: float


PRECISION = {torch.float32: Precision(1e-6, 2.4e-7), torch.float64: Precision(1e-11, 1e-15)}


class Sweep(NamedTuple):
    """Sums at tau, all [N]: psi(tau), KL(pi || old), mean and variance under pi of a = log new - log old."""

    psi: Tensor
    kl: Tensor
    mean: Tensor
    variance: Tensor


class Root(NamedTuple):
    """tau [N], passes [N] (sweeps over the slots, including the test of the bound), solved [N] bool."""

    tau: Tensor
    passes: Tensor
    solved: Tensor


def kl_terms(q: Tensor, pi: Tensor, y: Tensor) -> Tensor:
    """pi y - (pi - q) with y = log(pi / q): terms >= 0 that sum to KL(pi || q); to second order this
    holds even if rounding leaves the sums of pi and q slightly off 1."""
    return pi * y - torch.where(y < 1.0, q * torch.expm1(y), pi - q)


def sweep(pair: Pair, tau: Tensor) -> Sweep:
    """One pass over the slots at tau [N]."""
    a = pair.log_p - pair.log_q
    step = tau[:, None] * a
    psi = torch.logsumexp(pair.log_mass + step, dim=1)
    y = step - psi[:, None]
    pi = (pair.log_mass + y).exp()
    kl = kl_terms(pair.log_mass.exp(), pi, y).sum(1)
    mean = (pi * a).sum(1)
    variance = (pi * (a - mean[:, None]).square()).sum(1)
    return Sweep(psi, kl, mean, variance)


def solve(pair: Pair, bound: Tensor, test: Sweep) -> Root:
    """Find tau for rows whose KL at tau = 1 (`test`) exceeds bound [N] > 0.

    Newton on log KL against log tau, inside a bracket whose lower end has a closed form:
    Var <= R^2/4 gives KL <= tau^2 R^2/8 for a range R of a. Rows not solved in 20 passes keep the lower
    end, where KL <= bound. Waits for the device once per pass.
    """
    precision = PRECISION[bound.dtype]
    tau, hi = torch.ones_like(bound), torch.ones_like(bound)
    lo = _lower_bracket(pair, bound)
    solved = test.variance <= MIN_VARIANCE
    passes = torch.ones_like(bound, dtype=torch.int64)
    widths = [torch.full_like(bound, float("inf"))] * 2
    kl, variance = test.kl, test.variance
    for turn in range(MAX_PASSES):
        over = kl > bound
        hi = torch.where(~solved & over, tau, hi)
        lo = torch.where(~solved & ~over, tau, lo)
        close = (kl - bound).abs() <= precision.kl * bound
        solved = solved | close | (hi - lo <= precision.bracket * hi)
        if turn == MAX_PASSES - 1 or bool(solved.all()):
            break
        width = (hi / lo).log()
        newton = tau * torch.exp(-(kl / bound).log() * kl / (tau.square() * variance))
        slow = (width > 0.5 * widths[0]) & ((newton / tau).log().abs() > 0.01)
        inside = (newton > lo) & (newton < hi)
        widths = [widths[1], width]
        tau = torch.where(solved, tau, torch.where(inside & ~slow, newton, (lo * hi).sqrt()))
        _, kl, _, variance = sweep(pair, tau)
        passes = passes + ~solved
    return Root(torch.where(solved, tau, lo), passes, solved)


def _lower_bracket(pair: Pair, bound: Tensor) -> Tensor:
    a = pair.log_p - pair.log_q
    real = pair.multiplicity > 0
    highest = torch.where(real, a, float("-inf")).amax(1)
    lowest = torch.where(real, a, float("inf")).amin(1)
    return ((8.0 * bound).sqrt() / (highest - lowest)).clamp(max=1.0)
