"""Triton kernel of weight_grad/ref.py: sums over runs of equal columns, always in the same order.

Entries are sorted by column and split into blocks of 128. A run inside one block is added directly to its row
of main_grad, because no other block has that column. For a run that crosses blocks, each block stores its
partial sum, and a second kernel adds these up in block order. Uses no atomics and does not wait for the
device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from troll_kernels.build import ALIGNED, DTYPES, Build

ENTRIES, BLOCK, WARPS = 128, 1024, 4
CONSTANTS: dict[str, int | bool] = {"ENTRIES": ENTRIES, "BLOCK": BLOCK}


@triton.jit
def _add(to, values, inside):
    tl.store(to, tl.load(to, mask=inside, other=0.0) + values, mask=inside)


@triton.jit
def runs_kernel(
    COLUMN, ROW, GRAD, HIDDEN, MAIN, PARTS, hidden_stride, main_stride, hidden_size, vocab,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the runs of one block. COLUMN [blocks * ENTRIES + 1] int32, ascending, `vocab` on unused entries
    and at the end. PARTS [blocks, 2, hidden_size]: partial sums of the run continued from the previous block,
    and of the run that continues into the next."""
    block = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden_size
    parts = PARTS + block.to(tl.int64) * 2 * hidden_size + at
    first = block * ENTRIES
    column = tl.load(COLUMN + first)
    carried = tl.load(COLUMN + first - 1, mask=block > 0, other=-1) == column
    sums = tl.zeros((BLOCK,), tl.float32)
    end = tl.where(column < vocab, first + ENTRIES, first)
    for entry in range(first, end):
        if column < vocab:
            h = tl.load(HIDDEN + tl.load(ROW + entry) * hidden_stride + at, mask=inside, other=0.0)
            sums += tl.load(GRAD + entry) * h.to(tl.float32)
        following = tl.load(COLUMN + entry + 1)
        if (following != column) | (entry + 1 == end):
            if carried:
                tl.store(parts, sums, mask=inside)
            elif following == column:
                tl.store(parts + hidden_size, sums, mask=inside)
            elif column < vocab:
                _add(MAIN + column.to(tl.int64) * main_stride + at, sums, inside)
            sums = tl.zeros((BLOCK,), tl.float32)
            column = following
            carried = column < 0  # false: every later run begins in this block


@triton.jit
def crossings_kernel(
    COLUMN, MAIN, PARTS, main_stride, hidden_size, vocab, blocks,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add up the run that begins in this block and continues into the next."""
    block = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < hidden_size
    last = (block + 1) * ENTRIES - 1
    column = tl.load(COLUMN + last)
    crosses = (tl.load(COLUMN + last + 1) == column) & (column < vocab)
    begins = tl.load(COLUMN + block * ENTRIES - 1, mask=block > 0, other=-1) != column
    if crosses & begins:
        size = hidden_size.to(tl.int64)
        sums = tl.load(PARTS + (block * 2 + 1) * size + at, mask=inside, other=0.0)
        other = block + 1
        while tl.load(COLUMN + other * ENTRIES, mask=other < blocks, other=-1) == column:
            sums += tl.load(PARTS + other * 2 * size + at, mask=inside, other=0.0)
            other += 1
        _add(MAIN + column.to(tl.int64) * main_stride + at, sums, inside)


def add_weight_grad(main_grad: Tensor, grad: Tensor, columns: Tensor, hidden: Tensor) -> None:
    """See weight_grad/ref.py."""
    vocab, hidden_size = main_grad.shape
    blocks = triton.cdiv(columns.numel(), ENTRIES)
    if blocks == 0 or hidden_size == 0:
        return
    flat = columns.flatten()
    column, order = flat.where(flat >= 0, vocab).int().sort(stable=True)
    unused = blocks * ENTRIES + 1 - len(flat)
    column = torch.nn.functional.pad(column, (0, unused), value=vocab)
    row, sorted_grad = order // columns.shape[1], grad.float().flatten()[order]
    parts = torch.empty(blocks, 2, hidden_size, dtype=torch.float32, device=grad.device)
    grid, sizes = (blocks, triton.cdiv(hidden_size, BLOCK)), (main_grad.stride(0), hidden_size, vocab)
    hidden = hidden.contiguous()
    runs_kernel[grid](
        column, row, sorted_grad, hidden, main_grad, parts, hidden.stride(0), *sizes,
        **CONSTANTS, num_warps=WARPS,
    )  # fmt: skip
    crossings_kernel[grid](column, main_grad, parts, *sizes, blocks, **CONSTANTS, num_warps=WARPS)


def builds() -> list[Build]:
    main = {"MAIN": "*fp32", "PARTS": "*fp32"}
    integers = dict.fromkeys(("hidden_stride", "main_stride", "hidden_size"), ALIGNED) | {"vocab": "i32"}
    runs = [
        Build(
            f"{dtype} runs",
            runs_kernel,
            {"COLUMN": "*i32", "ROW": "*i64", "GRAD": "*fp32", "HIDDEN": pointer} | main | integers,
            CONSTANTS,
            WARPS,
            streams=True,
        )
        for dtype, pointer in DTYPES.items()
    ]
    sizes = {"main_stride": ALIGNED, "hidden_size": ALIGNED, "vocab": "i32", "blocks": "i32"}
    crossings = {"COLUMN": "*i32"} | main | sizes
    return [*runs, Build("crossings", crossings_kernel, crossings, CONSTANTS, WARPS, streams=True)]
