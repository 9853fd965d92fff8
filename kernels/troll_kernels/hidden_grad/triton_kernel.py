"""Triton kernel of hidden_grad/ref.py: a program handles one row and a block of its H columns, and loads the
weights of several slots together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from troll_kernels.build import ALIGNED, DTYPES, Build

SLOTS, BLOCK, WARPS = 4, 1024, 4
CONSTANTS: dict[str, int | bool] = {"SLOTS": SLOTS, "BLOCK": BLOCK}


@triton.jit
def hidden_grad_kernel(
    GRAD, COLUMNS, WEIGHT, OUT, weight_stride, hidden_size, slots,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden_size
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, slots, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        column = tl.load(COLUMNS + row * slots + slot, mask=slot < slots, other=-1)
        used = column >= 0
        if tl.max(used.to(tl.int32), 0) > 0:
            grad = tl.load(GRAD + row * slots + slot, mask=used, other=0.0)
            weights = WEIGHT + tl.where(used, column, 0)[:, None] * weight_stride + at[None, :]
            w = tl.load(weights, mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
            sums += tl.sum(w * grad[:, None], 0)
    tl.store(OUT + row * hidden_size + at, sums, mask=inside)


def hidden_grad(grad: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """See hidden_grad/ref.py."""
    rows, slots = columns.shape
    hidden_size = weight.shape[1]
    out = torch.empty(rows, hidden_size, dtype=torch.float32, device=grad.device)
    if out.numel():
        hidden_grad_kernel[(rows, triton.cdiv(hidden_size, BLOCK))](
            grad.float().contiguous(), columns.contiguous(), weight, out,
            weight.stride(0), hidden_size, slots, **CONSTANTS, num_warps=WARPS,
        )  # fmt: skip
    return out


def builds() -> list[Build]:
    integers = {"weight_stride": ALIGNED, "hidden_size": ALIGNED, "slots": "i32"}
    return [
        Build(
            dtype,
            hidden_grad_kernel,
            {"GRAD": "*fp32", "COLUMNS": "*i64", "WEIGHT": pointer, "OUT": "*fp32"} | integers,
            CONSTANTS,
            WARPS,
            streams=True,
        )
        for dtype, pointer in DTYPES.items()
    ]
