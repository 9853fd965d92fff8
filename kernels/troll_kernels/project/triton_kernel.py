"""Triton kernel of project/ref.py: one program per row, which keeps its slots in registers over all sweeps.

Backward uses the arguments and four numbers per row, and rebuilds the slots.
"""

from math import log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from troll_kernels.build import Build
from troll_kernels.project.pair_triton import LOWEST, at_ids, kl_terms, load, sides, sweep, union
from troll_kernels.project.ref import Projection, checked
from troll_kernels.project.solve import MAX_PASSES, MIN_VARIANCE, PRECISION

MAX_SLOTS = 512
CHUNK = 8
# In products the tensor comes first: the interpreter of Triton 3.7 does not support constexpr * tensor.
PASSES = tl.constexpr(MAX_PASSES)
NO_VARIANCE = tl.constexpr(MIN_VARIANCE)
CLOSE = tl.constexpr(PRECISION[torch.float32].kl)
NARROW = tl.constexpr(PRECISION[torch.float32].bracket)


@triton.jit
def _step(tau, kl, variance, bound, lo, hi, before, width):
    """Newton on log KL against log tau, or the middle of the bracket; see solve.py."""
    newton = tau * tl.exp(-tl.log(kl / bound) * kl / (tau * tau * variance))
    slow = (width > 0.5 * before) & (tl.abs(tl.log(newton / tau)) > 0.01)
    inside = (newton > lo) & (newton < hi)
    return tl.where(inside & (slow == 0), newton, tl.sqrt(lo * hi))


@triton.jit
def _root(log_q, a, log_rest, bound, kl, mean, variance, psi):
    """Find tau; return tau, its sweep, passes, and whether it was found. kl .. psi: the sweep at tau = 1."""
    tau, hi = tl.full((), 1.0, tl.float32), tl.full((), 1.0, tl.float32)
    span = tl.maximum(tl.max(a, 0), 0.0) - tl.minimum(tl.min(a, 0), 0.0)
    lo = tl.minimum(tl.sqrt(8.0 * bound) / span, 1.0)
    before, last = tl.full((), float("inf"), tl.float32), tl.full((), float("inf"), tl.float32)
    passes = tl.full((), 1, tl.int32)
    found = ((kl > bound) == 0) | (bound <= 0.0) | (variance <= NO_VARIANCE) | (kl - bound <= bound * CLOSE)
    while (found == 0) & (passes < PASSES):
        width = tl.log(hi / lo)
        tau = _step(tau, kl, variance, bound, lo, hi, before, width)
        before, last = last, width
        psi, kl, mean, variance = sweep(tau, log_q, a, log_rest)
        passes += 1
        hi, lo = tl.where(kl > bound, tau, hi), tl.where(kl > bound, lo, tau)
        found = (tl.abs(kl - bound) <= bound * CLOSE) | (hi - lo <= hi * NARROW)
    end = tl.where(bound > 0.0, tl.where(found, tau, lo), 0.0)
    if end != tau:
        psi, kl, mean, variance = sweep(end, log_q, a, log_rest)
    return end, psi, kl, mean, variance, passes, found


@triton.jit
def forward_kernel(
    NEW_IDS, NEW, OLD_IDS, OLD, BOUND, PI_NEW, PI_OLD, NUMBERS, FLAGS,
    rows, new_width, old_width, vocab, log_p_d,
    SHARED: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Project one row. NUMBERS [9, rows] float32 and FLAGS [3, rows] int32, in the order of the stores."""
    row = tl.program_id(0).to(tl.int64)
    new_q, new_a, old_q, old_a, only = sides(
        NEW_IDS, NEW, OLD_IDS, OLD, row, new_width, old_width, log_p_d, SHARED, SLOTS, CHUNK
    )
    log_q = union(new_q, tl.where(only, old_q, LOWEST), SHARED, SLOTS)
    a = union(new_a, tl.where(only, old_a, 0.0), SHARED, SLOTS)
    outside = vocab - tl.sum((log_q != LOWEST).to(tl.int32), 0)
    log_rest = tl.where(outside > 0, log_p_d + tl.log(tl.maximum(outside, 1).to(tl.float32)), LOWEST)
    bound = tl.load(BOUND + row)
    psi, before, mean, variance = sweep(1.0, log_q, a, log_rest)
    tau, psi, after, mean, variance, passes, found = _root(
        log_q, a, log_rest, bound, before, mean, variance, psi
    )
    # If the row does not move, pi equals new' bit for bit.
    left, shift = 1.0 - tau, tl.where(tau < 1.0, psi, 0.0)
    y = left * a + shift
    p = tl.exp(log_q + a)
    regression = tl.sum(kl_terms(tl.exp(log_q + a - y), p, y), 0)
    regression += kl_terms(tl.exp(log_rest - shift), tl.exp(log_rest), shift)
    slot = tl.arange(0, SLOTS)
    new, old = load(NEW, row, new_width, LOWEST, SLOTS), load(OLD, row, old_width, LOWEST, SLOTS)
    pi_new = tl.where(tau < 1.0, new_q + tau * new_a - shift, new)
    pi_old = tl.where(tau < 1.0, old_q + tau * old_a, old_q + old_a) - shift
    tl.store(PI_NEW + row * new_width + slot, tl.where(new != LOWEST, pi_new, LOWEST), mask=slot < new_width)
    tl.store(PI_OLD + row * old_width + slot, tl.where(old != LOWEST, pi_old, LOWEST), mask=slot < old_width)
    at = NUMBERS + row
    tl.store(at, log_p_d - shift)
    tl.store(at + rows, regression)
    tl.store(at + 2 * rows, outside.to(tl.float32))
    tl.store(at + 3 * rows, tau)
    tl.store(at + 4 * rows, before)
    tl.store(at + 5 * rows, after)
    tl.store(at + 6 * rows, psi)
    tl.store(at + 7 * rows, mean)
    tl.store(at + 8 * rows, variance)
    tl.store(FLAGS + row, passes)
    tl.store(FLAGS + rows + row, (before > bound).to(tl.int32))
    tl.store(FLAGS + 2 * rows + row, found.to(tl.int32))


@triton.jit
def backward_kernel(
    NEW_IDS, NEW, OLD_IDS, OLD, GRAD_NEW, GRAD_OLD, GRAD_DEFAULT, GRAD_KL, NUMBERS, ACTIVE, OUT,
    rows, new_width, old_width, log_p_d,
    SHARED: tl.constexpr, SLOTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Gradient of new_logp for one row (ALGORITHMS 1.5). NUMBERS as forward_kernel wrote them: tau at 3, psi,
    mean and variance at 6, 7 and 8."""
    row = tl.program_id(0).to(tl.int64)
    q, a, _, old_a, only = sides(
        NEW_IDS, NEW, OLD_IDS, OLD, row, new_width, old_width, log_p_d, SHARED, SLOTS, CHUNK
    )
    at = NUMBERS + row
    tau, psi, mean = tl.load(at + 3 * rows), tl.load(at + 6 * rows), tl.load(at + 7 * rows)
    variance = tl.load(at + 8 * rows)
    shift = tl.where(tau < 1.0, psi, 0.0)
    new, old = load(NEW, row, new_width, LOWEST, SLOTS), load(OLD, row, old_width, LOWEST, SLOTS)
    g = tl.where(new != LOWEST, load(GRAD_NEW, row, new_width, 0.0, SLOTS), 0.0)
    g_old = tl.where(old != LOWEST, load(GRAD_OLD, row, old_width, 0.0, SLOTS), 0.0)
    if SHARED:
        g += g_old
    else:
        ids = load(NEW_IDS, row, new_width, -1, SLOTS).to(tl.int32)
        g += at_ids(ids, new != LOWEST, OLD_IDS, OLD, GRAD_OLD, row, old_width, SLOTS, CHUNK)[0]
    g_only = tl.where(only, g_old, 0.0)
    # The upstream gradient of the default tokens is already their sum, and their a is 0.
    g_rest = tl.load(GRAD_DEFAULT + row)
    total = tl.sum(g, 0) + tl.sum(g_only, 0) + g_rest
    moment = tl.sum(g * (a - mean), 0) + tl.sum(g_only * (old_a - mean), 0) - g_rest * mean
    active = tl.load(ACTIVE + row) != 0
    free = active & (variance > NO_VARIANCE)
    y = (1.0 - tau) * a + shift
    pi = tl.exp(q + a - y)
    projected = g - pi * (total + (a - mean) * moment / tl.where(free, variance, 1.0))
    scale = tl.where(free, tau, tl.where(active | (tau == 0.0), 0.0, 1.0))
    grad = scale * tl.where(free, projected, g) + tl.load(GRAD_KL + row) * tl.exp(q + a) * y
    slot = tl.arange(0, SLOTS)
    tl.store(OUT + row * new_width + slot, tl.where(new != LOWEST, grad, 0.0), mask=slot < new_width)


def project(
    new_ids: Tensor,
    new_logp: Tensor,
    old_ids: Tensor,
    old_logp: Tensor,
    bound: Tensor,
    vocab: int,
    p_d: float,
) -> Projection:
    """See project/ref.py. float32 only."""
    shared = checked(new_ids, new_logp, old_ids, old_logp, bound)
    widest = max(new_logp.shape[1], old_logp.shape[1])
    if widest > MAX_SLOTS:
        raise ValueError(f"supports of {widest} slots: the Triton kernels hold at most {MAX_SLOTS}")
    fixed = (new_ids.contiguous(), old_ids.contiguous(), old_logp.detach().float().contiguous())
    return Projection(*_Project.apply(new_logp.contiguous(), *fixed, bound.float(), vocab, log(p_d), shared))


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        new_logp: Tensor,
        new_ids: Tensor,
        old_ids: Tensor,
        old_logp: Tensor,
        bound: Tensor,
        vocab: int,
        log_p_d: float,
        shared: bool,
    ) -> tuple[Tensor, ...]:
        rows, widths = len(new_logp), (new_logp.shape[1], old_logp.shape[1])
        pi_new, pi_old = torch.empty_like(new_logp), torch.empty_like(old_logp)
        numbers, flags = new_logp.new_empty(9, rows), new_logp.new_empty(3, rows, dtype=torch.int32)
        constants, warps = _launch(max(widths), shared)
        if rows:
            forward_kernel[(rows,)](
                new_ids, new_logp, old_ids, old_logp, bound.contiguous(), pi_new, pi_old, numbers, flags,
                rows, *widths, vocab, log_p_d, **constants, num_warps=warps,
            )  # fmt: skip
        ctx.save_for_backward(new_logp, new_ids, old_ids, old_logp, numbers, flags)
        ctx.settings = log_p_d, shared
        default, regression, *fixed = numbers[:6].clone()
        passes, active, solved = flags.long()
        fixed = (*fixed, active.bool(), passes, solved.bool())
        ctx.mark_non_differentiable(*fixed)
        return pi_new, pi_old, default, regression, *fixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        new_logp, new_ids, old_ids, old_logp, numbers, flags = ctx.saved_tensors
        log_p_d, shared = ctx.settings
        widths, grad = (new_logp.shape[1], old_logp.shape[1]), torch.empty_like(new_logp)
        constants, warps = _launch(max(widths), shared)
        if len(grad):
            backward_kernel[(len(grad),)](
                new_ids, new_logp, old_ids, old_logp, *(part.contiguous() for part in upstream[:4]),
                numbers, flags[1], grad, len(grad), *widths, log_p_d, **constants, num_warps=warps,
            )  # fmt: skip
        return grad, *(None,) * 7


def _launch(width: int, shared: bool) -> tuple[dict[str, int | bool], int]:
    """Constants and number of warps: each thread holds one slot of either side."""
    slots = max(triton.next_power_of_2(width), 32)
    return {"SHARED": shared, "SLOTS": slots, "CHUNK": CHUNK}, slots // 32


def builds() -> list[Build]:
    return [
        _build(name, kernel, width, shared)
        for name, kernel in (("forward", forward_kernel), ("backward", backward_kernel))
        for width in (65, 257)
        for shared in (True, False)
    ]


def _build(name: str, kernel: Any, width: int, shared: bool) -> Build:
    constants, warps = _launch(width, shared)
    types = {"NEW_IDS": "*i64", "OLD_IDS": "*i64", "FLAGS": "*i32", "ACTIVE": "*i32", "log_p_d": "fp32"}
    types |= dict.fromkeys(("rows", "new_width", "old_width", "vocab"), "i32")
    names = [name for name in kernel.arg_names if name not in constants]
    arguments = {name: types.get(name, "*fp32") for name in names}
    label = f"{name} {width} slots{' shared' if shared else ''}"
    return Build(label, kernel, arguments, constants, warps, streams=False)
