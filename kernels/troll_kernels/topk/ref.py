"""Exact top-K of rows whose tile maxima are known.

Every top-K entry lies in one of the K tiles with the largest maxima: the K maxima of these tiles rank before
all entries of any other tile.
"""

import torch
from torch import Tensor

from troll_kernels.sparsify import NO_ID
from troll_kernels.transform import LOWEST, widened


def top_k(logits: Tensor, tile_max: Tensor, width: int, k: int, tile: int) -> tuple[Tensor, Tensor]:
    """The k largest of the first `width` columns: raw values [C, k], float32 or better, and columns [C, k]
    int64, value descending, then column ascending. Slots past `width` hold -inf and NO_ID.

    logits [C, V_local] and tile_max [C, ceil(width / tile)] are input and output of `row_statistics`, without
    NaN. -0.0 equals +0.0 and is returned as +0.0; -inf is an ordinary value. Not differentiable.
    Holds C x K x tile values and columns. Accepts any k; the kernel raises ValueError for k > 256.
    """
    tiles = tile_max.shape[1]
    if tiles == 0 or k == 0:
        empty = widened(logits.new_full((len(logits), k), LOWEST))
        return empty, torch.full_like(empty, NO_ID, dtype=torch.int64)
    picked = largest(tile_max, min(k, tiles))[1].sort(1)[0]
    columns = (picked[:, :, None] * tile + torch.arange(tile, device=logits.device)).flatten(1)
    # Columns past the last rank after every token: they are -inf and have the highest columns.
    values = widened(logits.gather(1, columns.clamp(max=width - 1)))
    values = values.masked_fill(columns >= width, LOWEST)
    values, at = largest(values, min(k, columns.shape[1]))
    columns = columns.gather(1, at)
    missing = k - at.shape[1]
    values = torch.nn.functional.pad(values, (0, missing), value=LOWEST)
    columns = torch.nn.functional.pad(columns, (0, missing), value=width)
    return values, columns.masked_fill(columns >= width, NO_ID)


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k <= M largest entries of each row of values [C, M], and their positions, both [C, k]: value
    descending, then position ascending. -0.0 equals +0.0 and is returned as +0.0. Not differentiable.

    torch.topk chooses freely among ties of the k-th value, so rows with such ties are fully sorted.
    Waits for the device once. Holds a copy and a bool mask of C x M."""
    values = values.detach() + 0.0
    found, at = torch.topk(values, k)
    least = found[:, -1:]
    chosen = ((values == least).sum(1) > (found == least).sum(1)).nonzero()[:, 0]
    if chosen.numel():
        at[chosen] = values[chosen].sort(dim=1, descending=True, stable=True)[1][:, :k]
    at = at.sort(1)[0]
    found, order = values.gather(1, at).sort(dim=1, descending=True, stable=True)
    return found, at.gather(1, order)
