"""How context parallelism cuts a sequence."""

import torch
from torch import Tensor


def zigzag(length: int, size: int, rank: int) -> Tensor:
    """Positions [length / size] that context-parallel rank `rank` of `size` holds, ascending: chunks `rank`
    and `2 size - 1 - rank` of 2 size, which balances causal attention. All of them when size is 1.

    `length` must be a multiple of 2 size when size > 1.
    """
    if size == 1:
        return torch.arange(length)
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens cannot be cut into {2 * size} equal chunks")
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
