"""Matrices [N, V] with a few entries per row, given by `columns` [N, W] with NO_ID on unused slots."""

from typing import NamedTuple

import torch
from torch import Tensor

from troll_kernels.transform import widened


class Entries(NamedTuple):
    """The E used slots, row by row: columns [E], used [N, W] bool, and starts [N], each row's first entry."""

    columns: Tensor
    used: Tensor
    starts: Tensor


def entries(columns: Tensor) -> Entries:
    """Collect the used slots; columns below 0 are unused. Waits for the device, which computes E."""
    used = columns >= 0
    count = used.sum(1)
    return Entries(columns[used], used, count.cumsum(0) - count)


def table(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of weight [V, H] in float32 or better, and the index in them of each of columns [E]. The rows are
    weight itself, or for 16-bit weights a copy [U, H] of the U rows that are used."""
    if weight.dtype in (torch.float32, torch.float64):
        return weight, columns
    used, place = columns.unique(return_inverse=True)
    return widened(weight[used]), place
