"""Exact top-K of rows whose tile maxima are known.

Every top-K entry lies in one of the K tiles with the largest maxima: the K maxima of these tiles rank before
all entries of any other tile.
"""

import torch
from torch import Tensor

from troll_kernels.sparsify import NO_ID
from troll_kernels.transform import LOWEST, widened

# Columns of the tiles that are looked at a second time; divides every tile.
NARROW = 8


def top_k(logits: Tensor, tile_max: Tensor, width: int, k: int, tile: int) -> tuple[Tensor, Tensor]:
    """The k largest of the first `width` columns: raw values [C, k], float32 or better, and columns [C, k]
    int64, value descending, then column ascending. Slots past `width` hold -inf and NO_ID.

    logits [C, V_local] and tile_max [C, ceil(width / tile)] are input and output of `row_statistics`, without
    NaN. -0.0 equals +0.0 and is returned as +0.0; -inf is an ordinary value. Not differentiable.
    Holds C x K x tile values. Accepts any k; the kernel raises ValueError for k > 256.
    """
    tiles = tile_max.shape[1]
    if tiles == 0 or k == 0:
        empty = widened(logits.new_full((len(logits), k), LOWEST))
        return empty, torch.full_like(empty, NO_ID, dtype=torch.int64)
    picked = largest(tile_max, min(k, tiles))[1].sort(1)[0]
    values = _tiles(logits, picked, width, tile)
    # The same again, with narrower tiles: what is left is a part of the row, still in the order of columns.
    narrow = values.unflatten(1, (-1, NARROW))
    inner = largest(narrow.amax(2), min(k, narrow.shape[1]))[1].sort(1)[0]
    values, at = largest(_gathered(narrow, inner), min(k, inner.shape[1] * NARROW))
    place = inner.gather(1, at // NARROW) * NARROW + at % NARROW
    columns = picked.gather(1, place // tile) * tile + place % tile
    missing = k - at.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=LOWEST)
    columns = torch.nn.functional.pad(columns, (0, missing), value=width)
    return values, columns.masked_fill(columns >= width, NO_ID)


def _tiles(logits: Tensor, picked: Tensor, width: int, tile: int) -> Tensor:
    """Values [C, K x tile] of the tiles `picked` [C, K]; -inf past `width`."""
    past = -logits.shape[1] % tile
    whole = torch.nn.functional.pad(logits, (0, past)) if past else logits
    values = widened(_gathered(whole.unflatten(1, (-1, tile)), picked)).unflatten(1, (-1, tile))
    if width % tile:
        ends = picked == width // tile
        values[:, :, width % tile :].masked_fill_(ends[:, :, None], LOWEST)
    return values.flatten(1)


def _gathered(tiles: Tensor, picked: Tensor) -> Tensor:
    """[C, T, tile] at picked [C, K] -> [C, K x tile]."""
    rows, count, _ = tiles.shape
    first = torch.arange(rows, device=picked.device)[:, None] * count
    return tiles.flatten(0, 1)[(first + picked).flatten()].view(rows, -1)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k <= M largest entries of each row of values [C, M], and their positions, both [C, k]: value
    descending, then position ascending. -0.0 equals +0.0 and is returned as +0.0. Not differentiable.

    torch.topk chooses freely among ties of the k-th value, so rows with such ties are fully sorted.
    Waits for the device once."""
    values = values.detach()
    found, at = torch.topk(values, min(k + 1, values.shape[1]))
    if found.shape[1] > k:
        tied = (found[:, k - 1 : k] == found[:, k:]).any(1).nonzero()[:, 0] if k else found.new_empty(0)
        found, at = found[:, :k], at[:, :k].contiguous()
        if tied.numel():
            at[tied] = (values[tied] + 0.0).sort(dim=1, descending=True, stable=True)[1][:, :k]
    at = at.sort(1)[0]
    found, order = (values.gather(1, at) + 0.0).sort(dim=1, descending=True, stable=True)
    return found, at.gather(1, order)
