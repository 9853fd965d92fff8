"""Figures of a whole optimizer step, from sums that can be added up over micro-batches and ranks."""

import torch
from torch import Tensor


def effective_sample_size(mean: Tensor, mean_square: Tensor) -> Tensor:
    """(sum w)^2 / (N sum w^2) of non-negative weights, as a share of N in [0, 1]; 0 where all are 0.
    Elementwise; from the means of w and w^2."""
    return torch.where(mean_square > 0, mean.square() / mean_square, 0.0)


def correlation(moments: Tensor) -> Tensor:
    """Pearson's coefficient from the sums [6] of 1, x, y, x^2, y^2 and x y. NaN where x or y is constant."""
    n, x, y, xx, yy, xy = moments.double()
    spread = (n * xx - x.square()).clamp(min=0.0) * (n * yy - y.square()).clamp(min=0.0)
    return ((n * xy - x * y) / spread.sqrt()).clamp(-1.0, 1.0)


def moments(x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """The sums [6] of `correlation`, float64, of x [N] and y [N] where counted [N] is 1 (0 elsewhere)."""
    x, y, counted = x.double(), y.double(), counted.double()
    return torch.stack([torch.ones_like(x), x, y, x.square(), y.square(), x * y]) @ counted
