"""Triton kernel of topk/ref.py: one program per row. A radix selection over the bits of the tile maxima finds
the tiles, a second one over the tiles' logits finds the tokens; only those tiles are read."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from troll_kernels.build import ALIGNED, DTYPES, Build
from troll_kernels.dispatch import LARGEST_K
from troll_kernels.tiles import tile_size


@triton.jit
def _key(x):
    """Map float32 to uint32 > 0 with the same order; -0.0 and +0.0 have the same key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _of_key(key):
    bits = tl.where((key >> 31) == 0, key ^ 0xFFFFFFFF, key & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _chosen(keys, k, LOW: tl.constexpr):
    """Mask of the k largest of keys [M]; of equal keys the earliest are chosen. A key of 0 is never chosen:
    at least k keys must be above 0. The lowest LOW bits of a key are ignored."""
    keys = (keys >> LOW) << LOW
    least = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32 - LOW):
        higher = least | bit
        least = tl.where(tl.sum((keys >= higher).to(tl.int32), 0) >= k, higher, least).to(tl.uint32)
        bit = bit >> 1
    above, equal = keys > least, (keys == least) & (keys > 0)
    places = k - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= places))


@triton.jit
def _write(to, chosen, values):
    """Write the chosen entries of values [M], in order, to the first places of `to`."""
    tl.debug_barrier()
    tl.store(to + tl.cumsum(chosen.to(tl.int32), 0) - 1, values.to(tl.int64), mask=chosen)
    tl.debug_barrier()


@triton.jit
def topk_kernel(
    X, TILE_MAX, VALUES, COLUMNS, stride, row_size, width, tiles, k,
    TILE: tl.constexpr, TILES: tl.constexpr, K: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row, found = X + row * stride, COLUMNS + row * k
    tile, slot = tl.arange(0, TILES), tl.arange(0, K)
    maxima = tl.load(TILE_MAX + row * tiles + tile, mask=tile < tiles, other=float("-inf"))
    n_tiles = tl.minimum(k, tiles)
    _write(found, _chosen(tl.where(tile < tiles, _key(maxima), 0), n_tiles, LOW), tile)
    picked = tl.load(found + slot, mask=slot < n_tiles, other=0).to(tl.int32)
    columns = picked[:, None] * TILE + tl.arange(0, TILE)[None, :]
    listed = (slot < n_tiles)[:, None] & (columns < width)
    # Load whole tiles, up to the end of the row in memory: a mask by `width` would prevent 128-bit loads.
    x = tl.load(x_row + columns, mask=(slot < n_tiles)[:, None] & (columns < row_size), other=0.0)
    keys = tl.reshape(tl.where(listed, _key(x.to(tl.float32)), 0), (K * TILE,))
    # Candidates ascend by column, so the earliest of equal logits is the one with the lowest column.
    n = tl.minimum(k, width)
    _write(found, _chosen(keys, n, LOW), tl.reshape(columns, (K * TILE,)))
    column = tl.load(found + slot, mask=slot < n, other=0)
    key = _key(tl.load(x_row + column, mask=slot < n, other=0.0).to(tl.float32))
    # A single sort key: value, then the lowest column.
    packed = (key.to(tl.int64) << 31) | (0x7FFFFFFF - column)
    packed = tl.sort(tl.where(slot < n, packed, -1), descending=True)
    column = 0x7FFFFFFF - (packed & 0x7FFFFFFF)
    value = _of_key(((packed >> 31) & 0xFFFFFFFF).to(tl.uint32))
    tl.debug_barrier()
    tl.store(found + slot, tl.where(slot < n, column, -1), mask=slot < k)
    tl.store(VALUES + row * k + slot, tl.where(slot < n, value, float("-inf")), mask=slot < k)


def top_k(logits: Tensor, tile_max: Tensor, width: int, k: int, tile: int) -> tuple[Tensor, Tensor]:
    """See topk/ref.py."""
    if k > LARGEST_K:
        raise ValueError(f"k={k}: the Triton kernels keep at most {LARGEST_K} tokens per row")
    rows, tiles = tile_max.shape
    values = logits.new_full((rows, k), float("-inf"), dtype=torch.float32)
    columns = torch.full_like(values, -1, dtype=torch.int64)
    if rows and tiles and k:
        constants, warps = _launch(tiles, k, tile, logits.dtype == torch.bfloat16)
        topk_kernel[(rows,)](
            logits, tile_max, values, columns, logits.stride(0), logits.shape[1], width, tiles, k,
            **constants, num_warps=warps,
        )  # fmt: skip
    return values, columns


def _launch(tiles: int, k: int, tile: int, bf16: bool) -> tuple[dict[str, int], int]:
    """Constants and number of warps: 16 candidates per thread."""
    slots = triton.next_power_of_2(k)
    constants = {"TILE": tile, "TILES": triton.next_power_of_2(tiles), "K": slots, "LOW": 16 if bf16 else 0}
    return constants, min(max(max(slots * tile, constants["TILES"]) // 512, 4), 16)


def builds() -> list[Build]:
    forms = [("bf16", 151_936, 64), ("fp32", 151_936, 64), ("bf16", 18_992, 64), ("bf16", 151_936, 256)]
    return [_build(dtype, width, k) for dtype, width, k in forms]


def _build(dtype: str, width: int, k: int) -> Build:
    tile = tile_size(width, k)
    constants, warps = _launch(triton.cdiv(width, tile), k, tile, dtype == "bf16")
    pointers = {"X": DTYPES[dtype], "TILE_MAX": "*fp32", "VALUES": "*fp32", "COLUMNS": "*i64"}
    integers = {"stride": ALIGNED, "row_size": ALIGNED, "width": "i32", "tiles": "i32", "k": "i32"}
    label = f"{dtype} V={width} K={k}"
    return Build(label, topk_kernel, pointers | integers, constants, warps, streams=True)
