"""A matrix [N, V] with a few entries a row, given by `columns` [N, W] with NO_ID on unused slots."""

from typing import NamedTuple

import torch
from torch import Tensor

from troll_kernels.numbers import widened


class Entries(NamedTuple):
    """The E used slots, row by row: columns [E], used [N, W] bool, and where each row starts, [N]."""

    columns: Tensor
    used: Tensor
    starts: Tensor


def entries(columns: Tensor) -> Entries:
    """Columns below 0 are unused. Waits for the device, to learn E."""
    used = columns >= 0
    count = used.sum(1)
    return Entries(columns[used], used, count.cumsum(0) - count)


def table(weight: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of weight [V, H] in float32 or better, and where in them each of columns [E] is: weight itself, or
    a copy [U, H] of the U rows that are used."""
    if weight.dtype in (torch.float32, torch.float64):
        return weight, columns
    used, place = columns.unique(return_inverse=True)
    return widened(weight[used]), place
