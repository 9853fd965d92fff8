"""One pass over a chunk of logits: logsumexp, mean logit, the sampled token's logit, tile maxima."""

from typing import NamedTuple

import torch
from torch import Tensor

from troll_kernels.transform import CACHED, LOWEST, Transform, widened

# exp of these is exactly 0, as for -inf; but 0 times them is 0, not NaN.
SMALLEST_EXPONENT = {torch.float32: -200.0, torch.float64: -800.0}


class RowStatistics(NamedTuple):
    """Statistics of C rows; float32, or float64 for float64 logits, but for lse.

    lse [C]     logsumexp of the transformed logits, float64: in float32 its rounding alone, up to 1e-6, moves
                the mass of a prefix by a tenth of the delta at which it is cut. -inf if all logits of the
                row are -inf; NaN or +inf if the row holds a NaN or +inf, so checking lse checks the row
    mean [C]    sum_v p_v logit_v, so that the entropy is lse - mean (nats); 0 where lse is -inf
    target [C]  raw logit of the target, -inf if another shard holds it
    tile_max [C, ceil(width / tile)]   largest raw logit of each tile
    """

    lse: Tensor
    mean: Tensor
    target: Tensor
    tile_max: Tensor


def row_statistics(
    logits: Tensor, width: int, target: Tensor, transform: Transform, tile: int
) -> RowStatistics:
    """Compute the statistics of every row.

    logits [C, V_local] raw, bf16, fp16, float32 or float64, rows contiguous; only the first `width`
    columns are tokens. target [C] int64 column, outside [0, V_local) if another shard holds it.

    Over shards r: lse = logsumexp_r lse_r, mean = sum_r exp(lse_r - lse) mean_r, target = max_r target_r.
    Not differentiable. Holds temporaries of half a million numbers, or of one row if that is more (the
    kernel: none).
    """
    here = (target >= 0) & (target < width)
    at = target.masked_fill(~here, 0)[:, None]
    found = widened(logits.gather(1, at)[:, 0]).masked_fill(~here, LOWEST)
    blocks = logits[:, :width].split(max(CACHED // max(width, 1), 1))
    lse, mean, tile_max = (torch.cat(part) for part in zip(*(_block(x, transform, tile) for x in blocks)))
    return RowStatistics(lse, mean, found, tile_max)


def _block(real: Tensor, transform: Transform, tile: int) -> tuple[Tensor, Tensor, Tensor]:
    real = widened(real)
    tile_max = _tile_max(real, tile)
    top = transform.apply(tile_max.amax(1)) if real.shape[1] else real.new_full((len(real),), LOWEST)
    shift = top.masked_fill(top == LOWEST, 0.0)
    exponent = (transform.apply(real) - shift[:, None]).clamp_(min=SMALLEST_EXPONENT[real.dtype])
    p = exponent.exp()
    mass = p.sum(1)
    mean = exponent.mul_(p).sum(1) / mass + shift
    return shift.double() + mass.double().log(), mean.masked_fill(mass == 0, 0.0), tile_max


def _tile_max(real: Tensor, tile: int) -> Tensor:
    whole = real.shape[1] // tile * tile
    parts = [real[:, :whole].unflatten(1, (-1, tile)).amax(2)] if whole else []
    if whole < real.shape[1]:
        parts.append(real[:, whole:].amax(1, keepdim=True))
    return torch.cat(parts, 1) if parts else real
