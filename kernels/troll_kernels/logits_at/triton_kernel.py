"""Triton kernel of logits_at/ref.py: a program handles one row and a few of its columns, and loads the
weights of these columns together."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from troll_kernels.build import ALIGNED, DTYPES, Build

SLOTS, BLOCK, WARPS = 16, 256, 4
CONSTANTS: dict[str, int | bool] = {"SLOTS": SLOTS, "BLOCK": BLOCK}


@triton.jit
def logits_at_kernel(
    HIDDEN, WEIGHT, COLUMNS, OUT, hidden_stride, weight_stride, hidden_size, slots,
    SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    column = tl.load(COLUMNS + row * slots + slot, mask=slot < slots, other=-1)
    used = column >= 0
    weights = WEIGHT + tl.where(used, column, 0)[:, None] * weight_stride
    sums = tl.zeros((SLOTS, BLOCK), tl.float32)
    # A program that has only unused slots reads no weights.
    end = tl.where(tl.max(used.to(tl.int32), 0) > 0, hidden_size, 0)
    for start in range(0, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < hidden_size
        h = tl.load(HIDDEN + row * hidden_stride + at, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weights + at[None, :], mask=used[:, None] & inside[None, :], other=0.0).to(tl.float32)
        sums += w * h[None, :]
    logits = tl.where(used, tl.sum(sums, 1), float("-inf"))
    tl.store(OUT + row * slots + slot, logits, mask=slot < slots)


def logits_at(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """See logits_at/ref.py."""
    rows, slots = columns.shape
    hidden, columns = hidden.detach().contiguous(), columns.contiguous()
    out = torch.empty(rows, slots, dtype=torch.float32, device=hidden.device)
    if out.numel():
        logits_at_kernel[(rows, triton.cdiv(slots, SLOTS))](
            hidden, weight.detach(), columns, out,
            hidden.stride(0), weight.stride(0), hidden.shape[1], slots, **CONSTANTS, num_warps=WARPS,
        )  # fmt: skip
    return out


def builds() -> list[Build]:
    integers = dict.fromkeys(("hidden_stride", "weight_stride", "hidden_size"), ALIGNED) | {"slots": "i32"}
    return [
        Build(
            dtype,
            logits_at_kernel,
            {"HIDDEN": pointer, "WEIGHT": pointer, "COLUMNS": "*i64", "OUT": "*fp32"} | integers,
            CONSTANTS,
            WARPS,
            streams=True,
        )
        for dtype, pointer in DTYPES.items()
    ]
