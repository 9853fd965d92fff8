"""Running values over the tokens of packed responses: never across the border between two of them.

[L] holds the tokens of all responses, one response after the other; owner [L] names each token's response.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def scan(values: Tensor, owner: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """[L] inclusive scan of each response with an associative `combine` (torch.add, torch.minimum, ...).

    log2(L) passes (Hillis and Steele, 1986). Nothing leaks over a border, infinities included.
    """
    reach = 1
    while reach < len(values):
        joined = combine(values[:-reach], values[reach:])
        tail = torch.where(owner[reach:] == owner[:-reach], joined, values[reach:])
        values = torch.cat((values[:reach], tail))
        reach *= 2
    return values


def before(values: Tensor, owner: Tensor, first: float) -> Tensor:
    """[L] the entry of the token before in the same response, `first` where there is none."""
    shifted = torch.cat((values.new_full((1,), first), values))[:-1]
    return torch.where(starts(owner), first, shifted)


def starts(owner: Tensor) -> Tensor:
    """[L] bool, the first token of each response."""
    return torch.cat((owner.new_full((1,), -1), owner))[:-1] != owner


def places(owner: Tensor) -> Tensor:
    """[L] int64, index of each token in its response."""
    return scan(torch.ones_like(owner), owner, torch.add) - 1
