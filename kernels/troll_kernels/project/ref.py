"""The TROLL projection and its closed-form vector-Jacobian product (ALGORITHMS 1.3 and 1.5).

    log pi = log old' + tau (log new' - log old') - psi(tau),   KL(pi || old') = min(bound, KL(new' || old'))

Backward keeps six [N, U] matrices, U = W_new + W_old + 1 (W + 1 on shared ids); forward holds about ten
while it runs. Nothing here holds N x V.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from troll_kernels.project.pair import LOWEST, Pair, pair_aligned, pair_union
from troll_kernels.project.solve import MIN_VARIANCE, Root, Sweep, kl_terms, solve, sweep


class Projection(NamedTuple):
    """The projected policy pi of N positions. The first four are differentiable in new_logp.

    new [N, W_new], old [N, W_old]   log pi on the slots of either side, -inf on slots outside its support
    default [N]      log pi of each single token outside both supports
    kl_new_pi [N]    KL(new' || sg(pi)), the regression term of eq. 5; exactly 0 on rows inside the ball
    outside [N]      V - |union|, the number of default tokens
    tau [N]          1/(1 + eta): 1 inside the ball, 0 for a bound of 0
    kl_before, kl_after [N]   KL(new' || old'), KL(pi || old')
    active [N] bool  kl_before > bound
    passes [N] int64 sweeps of the solver, including the test of the bound
    solved [N] bool  False if the solver gave up and kept a smaller step than the bound allows
    """

    new: Tensor
    old: Tensor
    default: Tensor
    kl_new_pi: Tensor
    outside: Tensor
    tau: Tensor
    kl_before: Tensor
    kl_after: Tensor
    active: Tensor
    passes: Tensor
    solved: Tensor


def project(
    new_ids: Tensor,
    new_logp: Tensor,
    old_ids: Tensor,
    old_logp: Tensor,
    bound: Tensor,
    vocab: int,
    p_d: float,
) -> Projection:
    """Project new' [N, W_new] onto the KL ball of radius bound [N] (nats) around old' [N, W_old].

    new_logp, old_logp are float32 or float64 log-probs of eq. 21 (`sparse_logp`), -inf on padding; each
    must have mass 1 with p_d on every token it does not list. Ids are int64; passing the same tensor as
    new_ids and old_ids means that the slots are shared, and skips the matching.
    A bound of 0 gives pi = old' with zero gradient. Raises ValueError for a negative or NaN bound.
    Waits for the device once per solver pass. The kernel waits once, and allows at most 512 slots per side.
    """
    shared = checked(new_ids, new_logp, old_ids, old_logp, bound)
    old_logp = old_logp.detach().to(new_logp.dtype)
    if shared:
        pair = pair_aligned(new_logp.detach(), old_logp, vocab, p_d)
    else:
        pair = pair_union(new_ids, new_logp.detach(), old_ids, old_logp, vocab, p_d)
    return Projection(*_Project.apply(new_logp, old_logp, bound.to(new_logp.dtype), pair))


def checked(new_ids: Tensor, new_logp: Tensor, old_ids: Tensor, old_logp: Tensor, bound: Tensor) -> bool:
    """Raise ValueError for invalid arguments of `project`; return whether the slots are shared."""
    if not bool((bound >= 0).all()):
        raise ValueError(f"trust-region bounds must be >= 0; the lowest is {float(bound.min())}")
    shared = new_ids is old_ids
    if shared and new_logp.shape != old_logp.shape:
        raise ValueError(f"shared ids, but shapes {tuple(new_logp.shape)} and {tuple(old_logp.shape)}")
    return shared


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, new_logp: Tensor, old_logp: Tensor, bound: Tensor, pair: Pair
    ) -> tuple[Tensor, ...]:
        test = sweep(pair, torch.ones_like(bound))
        active = test.kl > bound
        root = _root(pair, bound, test, active)
        final = _final(pair, root.tau, test)
        moved = root.tau < 1
        step = root.tau[:, None] * (pair.log_p - pair.log_q) - final.psi[:, None]
        log_pi = torch.where(moved[:, None], pair.log_q + step, pair.log_p)
        y = pair.log_p - log_pi
        regression = pair.multiplicity * kl_terms(log_pi.exp(), pair.log_p.exp(), y)
        width = new_logp.shape[1]
        d = pair.log_p - pair.log_q - final.mean[:, None]
        ctx.save_for_backward(
            new_logp,
            old_logp,
            d,
            pair.multiplicity,
            pair.old_slot,
            log_pi,
            y,
            root.tau,
            active,
            final.variance,
        )
        outputs = (
            torch.where(new_logp != LOWEST, log_pi[:, :width], LOWEST),
            torch.where(old_logp != LOWEST, log_pi.gather(1, pair.old_slot), LOWEST),
            log_pi[:, -1].clone(),
            regression.sum(1),
        )
        outside = pair.multiplicity[:, -1].clone()
        fixed = (outside, root.tau, test.kl, final.kl, active, root.passes, root.solved)
        ctx.mark_non_differentiable(*fixed)
        return outputs + fixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        new_logp, old_logp, d, multiplicity, old_slot, log_pi, y, tau, active, variance = ctx.saved_tensors
        g_new, g_old, g_default, g_kl = upstream[:4]
        width = new_logp.shape[1]
        inside = new_logp != LOWEST
        # Upstream gradient per slot; that of the default slot is already the sum over its tokens.
        g = torch.zeros_like(d)
        g[:, :width] = torch.where(inside, g_new, 0.0)
        g[:, -1] = g_default
        g.scatter_add_(1, old_slot, torch.where(old_logp != LOWEST, g_old, 0.0))
        pi = multiplicity * log_pi.exp()
        # An active row without variance cannot move; a bound of 0 fixes pi to old'.
        free = active & (variance > MIN_VARIANCE)
        slope = (g * d).sum(1) / torch.where(free, variance, 1.0)
        projected = g - pi * (g.sum(1, keepdim=True) + d * slope[:, None])
        scale = torch.where(free, tau, torch.where(active | (tau == 0), 0.0, 1.0))
        grad = scale[:, None] * torch.where(free[:, None], projected, g)
        grad = grad + g_kl[:, None] * multiplicity * (y + log_pi).exp() * y
        return torch.where(inside, grad[:, :width], 0.0), None, None, None


def _root(pair: Pair, bound: Tensor, test: Sweep, active: Tensor) -> Root:
    """tau of every row; the solver runs only on rows outside a ball of positive radius."""
    tau = torch.where(bound > 0, torch.ones_like(bound), 0.0)
    passes = torch.ones_like(bound, dtype=torch.int64)
    solved = torch.ones_like(active)
    rows = torch.nonzero(active & (bound > 0))[:, 0]
    if rows.numel() == 0:
        return Root(tau, passes, solved)
    root = solve(pair.rows(rows), bound[rows], Sweep(*(field[rows] for field in test)))
    return Root(
        tau.index_copy(0, rows, root.tau),
        passes.index_copy(0, rows, root.passes),
        solved.index_copy(0, rows, root.solved),
    )


def _final(pair: Pair, tau: Tensor, test: Sweep) -> Sweep:
    """The sweep at the solved tau; rows that did not move keep the sweep of the test."""
    rows = torch.nonzero(tau < 1)[:, 0]
    if rows.numel() == 0:
        return test
    moved = sweep(pair.rows(rows), tau[rows])
    return Sweep(*(field.index_copy(0, rows, part) for field, part in zip(test, moved)))
