"""Triton kernel of rows/ref.py: one program per row, every logit read once.

Exponentials are in base 2, of differences of logits: the product of a logit of 20 with a scale is rounded by
1e-6. Each tile of a step has its own running sums, so no step waits for another warp.
"""

import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

from troll_kernels.build import ALIGNED, DTYPES, Build
from troll_kernels.rows.ref import RowStatistics
from troll_kernels.tiles import NARROWEST, WIDEST
from troll_kernels.transform import LOWEST, Transform

# Logits that a program loads per step: wider steps spill registers.
STEP = 2048
WARPS = 4
# The length of a row must be a multiple of this for 128-bit loads.
ALIGNMENT = 16
# Stands for -inf, because 0 times it is 0; no logit of a network is below it.
FLOOR = tl.constexpr(-1e30)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def capped(x, cap):
    """cap tanh(x / cap); FLOOR stays FLOOR."""
    return tl.where(x > FLOOR, cap - 2.0 * cap / (1.0 + tl.exp(2.0 * x / cap)), x)


@triton.jit
def _absorb(x, top, mass, moment, scale, cap, CAPPED: tl.constexpr):
    """Update the running maximum (before the scale), mass and first moment, each [TILES], with x
    [TILES, TILE]; also return the maximum of each tile."""
    tile_max = tl.max(x, 1)
    highest = tile_max
    if CAPPED:
        x = capped(x, cap)
        highest = capped(highest, cap)
    new_top = tl.maximum(top, highest)
    p = tl.exp2((x - new_top[:, None]) * scale)
    shrink = tl.exp2((top - new_top) * scale)
    mass = mass * shrink + tl.sum(p, 1)
    moment = moment * shrink + tl.sum(p * x, 1)
    return new_top, mass, moment, tl.where(tile_max > FLOOR, tile_max, float("-inf"))


@triton.jit
def rows_kernel(
    X, TARGET, LSE, MEAN, FOUND, TILE_MAX,
    stride, width, tiles, inverse_temperature, cap,
    CAPPED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, maxima = X + row * stride, TILE_MAX + row * tiles
    tile = tl.arange(0, TILES)
    column = tile[:, None] * TILE + tl.arange(0, TILE)[None, :]
    scale = inverse_temperature * LOG2E
    top = tl.full((TILES,), FLOOR, tl.float32)
    mass = tl.zeros((TILES,), tl.float32)
    moment = tl.zeros((TILES,), tl.float32)
    whole = width // (TILES * TILE)
    for step in range(whole):
        x = tl.load(x_row + step * TILES * TILE + column).to(tl.float32)
        x = tl.where(x < FLOOR, FLOOR, x)
        top, mass, moment, tile_max = _absorb(x, top, mass, moment, scale, cap, CAPPED)
        tl.store(maxima + step * TILES + tile, tile_max)
    if whole * TILES * TILE < width:
        column += whole * TILES * TILE
        x = tl.load(x_row + column, mask=column < width, other=float("-inf")).to(tl.float32)
        x = tl.where(x < FLOOR, FLOOR, x)
        top, mass, moment, tile_max = _absorb(x, top, mass, moment, scale, cap, CAPPED)
        tile += whole * TILES
        tl.store(maxima + tile, tile_max, mask=tile < tiles)
    row_top = tl.max(top, 0)
    share = tl.exp2((top - row_top) * scale)
    row_mass = tl.sum(mass * share, 0)
    empty = row_top <= FLOOR
    lse = (row_top * inverse_temperature).to(tl.float64) + tl.log(row_mass.to(tl.float64))
    mean = tl.sum(moment * share, 0) / row_mass * inverse_temperature
    tl.store(LSE + row, tl.where(empty, float("-inf"), lse))
    tl.store(MEAN + row, tl.where(empty, 0.0, mean))
    target = tl.load(TARGET + row)
    here = (target >= 0) & (target < width)
    tl.store(FOUND + row, tl.load(x_row + target, mask=here, other=float("-inf")).to(tl.float32))


def row_statistics(
    logits: Tensor, width: int, target: Tensor, transform: Transform, tile: int
) -> RowStatistics:
    """See rows/ref.py."""
    if logits.stride(0) % ALIGNMENT:
        warnings.warn(
            f"rows of {logits.stride(0)} logits, not a multiple of {ALIGNMENT}: every kernel that reads them "
            "loads one number at a time, slower; pad the vocabulary shard",
            stacklevel=2,
        )
    rows, tiles = len(logits), triton.cdiv(width, tile)
    lse = torch.empty(rows, dtype=torch.float64, device=logits.device)
    mean, found = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    tile_max = torch.empty(rows, tiles, dtype=torch.float32, device=logits.device)
    if rows and width:
        constants = _constants(tile, transform.cap is not None)
        rows_kernel[(rows,)](
            logits, target, lse, mean, found, tile_max,
            logits.stride(0), width, tiles, 1.0 / transform.temperature, transform.cap or 1.0,
            **constants, num_warps=WARPS,
        )  # fmt: skip
    else:
        lse.fill_(LOWEST)
        mean.zero_()
        found.fill_(LOWEST)
    return RowStatistics(lse, mean, found, tile_max)


def _constants(tile: int, capped: bool) -> dict[str, int | bool]:
    return {"CAPPED": capped, "TILE": tile, "TILES": STEP // tile}


def builds() -> list[Build]:
    tiles = [(dtype, NARROWEST, False) for dtype in DTYPES] + [(dtype, WIDEST, False) for dtype in DTYPES]
    return [
        Build(
            f"{dtype} tile {tile}{' capped' if capped else ''}",
            rows_kernel,
            {"X": DTYPES[dtype], "TARGET": "*i64"}
            | {"LSE": "*fp64"}
            | dict.fromkeys(("MEAN", "FOUND", "TILE_MAX"), "*fp32")
            | {"stride": ALIGNED, "width": "i32", "tiles": "i32"}
            | dict.fromkeys(("inverse_temperature", "cap"), "fp32"),
            _constants(tile, capped),
            WARPS,
            streams=True,
        )
        for dtype, tile, capped in [*tiles, ("bf16", WIDEST, True)]
    ]
