"""Triton kernel of logits_grad/ref.py: one pass, in place."""

import triton
import triton.language as tl
from torch import Tensor

from troll_kernels.build import ALIGNED, DTYPES, Build
from troll_kernels.rows.triton_kernel import FLOOR, LOG2E, capped
from troll_kernels.transform import Transform

BLOCK, WARPS = 2048, 4


@triton.jit
def logits_grad_kernel(
    X, LSE, MEAN, LSE_GRAD, MEAN_GRAD, stride, columns, width, inverse_temperature, cap,
    CAPPED: tl.constexpr, WITH_MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = X + row * stride + column
    raw = tl.load(at, mask=column < columns, other=float("-inf")).to(tl.float32)
    x = tl.where((raw < FLOOR) | (column >= width), FLOOR, raw)
    slope = inverse_temperature
    if CAPPED:
        x = capped(x, cap)
        tanh = tl.maximum(x / cap, -1.0)
        slope *= 1.0 - tanh * tanh
    x *= inverse_temperature
    lse = tl.load(LSE + row).to(tl.float32)
    factor = tl.load(LSE_GRAD + row)
    if WITH_MEAN:
        factor += tl.load(MEAN_GRAD + row) * (1.0 + x - tl.load(MEAN + row))
    grad = tl.exp2((x - lse) * LOG2E) * factor * slope
    tl.store(at, grad.to(X.dtype.element_ty), mask=column < columns)


def to_logits_grad(
    logits: Tensor,
    width: int,
    lse: Tensor,
    mean: Tensor,
    lse_grad: Tensor,
    mean_grad: Tensor | None,
    transform: Transform,
) -> None:
    """See logits_grad/ref.py."""
    rows, columns = logits.shape
    if logits.numel():
        logits_grad_kernel[(rows, triton.cdiv(columns, BLOCK))](
            logits, lse, mean, lse_grad.contiguous(), mean if mean_grad is None else mean_grad.contiguous(),
            logits.stride(0), columns, width, 1.0 / transform.temperature, transform.cap or 1.0,
            **_constants(transform.cap is not None, mean_grad is not None), num_warps=WARPS,
        )  # fmt: skip


def _constants(capped: bool, with_mean: bool) -> dict[str, int | bool]:
    return {"CAPPED": capped, "WITH_MEAN": with_mean, "BLOCK": BLOCK}


def builds() -> list[Build]:
    pointers = {"LSE": "*fp64"} | dict.fromkeys(("MEAN", "LSE_GRAD", "MEAN_GRAD"), "*fp32")
    numbers = {"stride": ALIGNED, "columns": ALIGNED, "width": "i32"}
    numbers |= dict.fromkeys(("inverse_temperature", "cap"), "fp32")
    forms = [("bf16", False, False), ("bf16", True, True), ("fp32", False, True)]
    return [
        Build(
            dtype + " capped" * capped + " with mean" * with_mean,
            logits_grad_kernel,
            {"X": DTYPES[dtype]} | pointers | numbers,
            _constants(capped, with_mean),
            WARPS,
            streams=True,
        )
        for dtype, capped, with_mean in forms
    ]
