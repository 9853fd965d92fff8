"""Triton kernel of sparsify/ref.py: one row per program, its slots in registers; masses in float64."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from troll_kernels.build import Build
from troll_kernels.sparsify.ref import NO_ID, check_default

LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _prefix(values, LSE, row, LIMIT: tl.constexpr):
    """Mask of those descending logits `values` [SLOTS], -inf past the last, that hold the first LIMIT of the
    mass. Entries after a NaN are kept, as in the reference."""
    mass = tl.exp(values.to(tl.float64) - tl.load(LSE + row).to(tl.float64))
    before = tl.cumsum(mass, 0) - mass
    return (values != LOWEST) & ((before >= LIMIT) == 0)


@triton.jit
def prefix_kernel(VALUES, LSE, KEPT, k, LIMIT: tl.constexpr, SLOTS: tl.constexpr):
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    values = tl.load(VALUES + row * k + slot, mask=slot < k, other=LOWEST)
    tl.store(KEPT + row * k + slot, _prefix(values, LSE, row, LIMIT).to(tl.int8), mask=slot < k)


@triton.jit
def select_kernel(
    VALUES, IDS, LSE, TARGET, TARGET_LOGIT, OUT_IDS, LOGITS, COUNT, PLACE, APPENDED, k,
    LIMIT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    values = tl.load(VALUES + row * k + slot, mask=slot < k, other=LOWEST)
    ids = tl.load(IDS + row * k + slot, mask=slot < k, other=-1)
    target, target_logit = tl.load(TARGET + row), tl.load(TARGET_LOGIT + row)
    kept = _prefix(values, LSE, row, LIMIT)
    length = tl.sum(kept.to(tl.int32), 0)
    found = tl.min(tl.where(kept & (ids == target), slot, SLOTS), 0)
    append = (found == SLOTS) & (target_logit != LOWEST)
    new = (slot == length) & append
    out = row * (k + 1) + slot
    tl.store(OUT_IDS + out, tl.where(new, target, tl.where(kept, ids, -1)), mask=slot <= k)
    tl.store(LOGITS + out, tl.where(new, target_logit, tl.where(kept, values, LOWEST)), mask=slot <= k)
    tl.store(COUNT + row, (length + append.to(tl.int32)).to(tl.int64))
    appended = tl.where(append, length, -1)
    tl.store(PLACE + row, tl.where(found < SLOTS, found, appended).to(tl.int64))
    tl.store(APPENDED + row, appended.to(tl.int64))


@triton.jit
def _inside(kept, vocab, P_D: tl.constexpr):
    """log(1 - (V - |S|) p_d), the log of the support's mass, float32."""
    outside = vocab - tl.sum(kept.to(tl.int32), 0)
    return tl.log(1.0 - outside.to(tl.float64) * P_D).to(tl.float32)


@triton.jit
def logp_kernel(LOGITS, COUNT, OUT, width, vocab, P_D: tl.constexpr, SLOTS: tl.constexpr):
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    logits = tl.load(LOGITS + row * width + slot, mask=slot < tl.load(COUNT + row), other=LOWEST)
    top = tl.max(logits, 0)
    lse = top + tl.log(tl.sum(tl.exp(logits - top), 0))
    logp = logits - lse + _inside(logits != LOWEST, vocab, P_D)
    tl.store(OUT + row * width + slot, logp, mask=slot < width)


@triton.jit
def logp_grad_kernel(LOGP, GRAD, OUT, width, vocab, P_D: tl.constexpr, SLOTS: tl.constexpr):
    row, slot = tl.program_id(0).to(tl.int64), tl.arange(0, SLOTS)
    logp = tl.load(LOGP + row * width + slot, mask=slot < width, other=LOWEST)
    grad = tl.load(GRAD + row * width + slot, mask=slot < width, other=0.0)
    kept = logp != LOWEST
    grad -= tl.exp(logp - _inside(kept, vocab, P_D)) * tl.sum(grad, 0)
    tl.store(OUT + row * width + slot, tl.where(kept, grad, 0.0), mask=slot < width)


def in_prefix(values: Tensor, lse: Tensor, delta: float) -> Tensor:
    """See sparsify/ref.py."""
    kept = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    if kept.numel():
        rows, k = values.shape
        prefix_kernel[(rows,)](values.detach().contiguous(), lse.contiguous(), kept, k, **_launch(k, delta))
    return kept.bool()


def select(
    values: Tensor, ids: Tensor, lse: Tensor, target: Tensor, target_logit: Tensor, delta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See sparsify/ref.py."""
    return _Select.apply(values, target_logit, ids, lse, target, delta)  # pyright: ignore[reportReturnType]


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, target_logit: Tensor, ids: Tensor, lse: Tensor, target: Tensor, delta: float
    ) -> tuple[Tensor, ...]:
        rows, k = values.shape
        out_ids = torch.empty(rows, k + 1, dtype=torch.int64, device=values.device)
        logits = torch.empty(rows, k + 1, dtype=torch.float32, device=values.device)
        count, place, appended = out_ids.new_empty(3, rows)
        if rows:
            given = (part.contiguous() for part in (values, ids, lse, target, target_logit))
            select_kernel[(rows,)](*given, out_ids, logits, count, place, appended, k, **_launch(k, delta))
        ctx.save_for_backward(count, appended)
        ctx.mark_non_differentiable(out_ids, count, place)
        return out_ids, logits, count, place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, upstream: Tensor, *__: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        count, appended = ctx.saved_tensors
        slot = torch.arange(upstream.shape[1] - 1, device=upstream.device)
        prefix = slot < (count - (appended != NO_ID).long())[:, None]
        sampled = upstream.gather(1, appended.clamp(min=0)[:, None])[:, 0]
        return (
            upstream[:, :-1].masked_fill(~prefix, 0.0),
            sampled.masked_fill(appended == NO_ID, 0.0),
            *(None,) * 4,
        )


def sparse_logp(logits: Tensor, count: Tensor, vocab: int, p_d: float) -> Tensor:
    """See sparsify/ref.py."""
    check_default(logits, count, vocab, p_d)
    result = _SparseLogp.apply(logits, count, vocab, p_d)
    assert isinstance(result, Tensor)
    return result


class _SparseLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, count: Tensor, vocab: int, p_d: float) -> Tensor:
        rows, width = logits.shape
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        ctx.settings = width, vocab, {"P_D": p_d, "SLOTS": triton.next_power_of_2(width)}
        if rows:
            logp_kernel[(rows,)](
                logits.contiguous(), count.contiguous(), out, width, vocab, **ctx.settings[2]
            )
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (logp,) = ctx.saved_tensors
        width, vocab, constants = ctx.settings
        grad = torch.empty_like(logp)
        if len(logp):
            logp_grad_kernel[(len(logp),)](logp, upstream.contiguous(), grad, width, vocab, **constants)
        return grad, None, None, None


def _launch(k: int, delta: float) -> dict[str, float | int]:
    """Constants of a launch. LIMIT is compiled in: as an argument it would be rounded to float32."""
    return {"LIMIT": 1.0 - delta, "SLOTS": triton.next_power_of_2(k + 1)}


def builds() -> list[Build]:
    return [build for k in (64, 256) for build in _builds(k)]


def _builds(k: int) -> list[Build]:
    choosing, dividing = _launch(k, 1e-5), {"P_D": 1e-12, "SLOTS": triton.next_power_of_2(k + 1)}
    kernels = (
        ("prefix", prefix_kernel, choosing),
        ("select", select_kernel, choosing),
        ("logp", logp_kernel, dividing),
        ("logp backward", logp_grad_kernel, dividing),
    )
    return [_build(f"{name} K={k}", kernel, constants) for name, kernel, constants in kernels]


def _build(label: str, kernel: Any, constants: dict[str, float | int]) -> Build:
    types = dict.fromkeys(("IDS", "TARGET", "OUT_IDS", "COUNT", "PLACE", "APPENDED"), "*i64")
    types |= {"KEPT": "*i8", "LSE": "*fp64"} | dict.fromkeys(("k", "width", "vocab"), "i32")
    names = [name for name in kernel.arg_names if name not in constants]
    arguments = {name: types.get(name, "*fp32") for name in names}
    return Build(label, kernel, arguments, constants, 4, streams=False)
