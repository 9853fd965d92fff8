"""Dtypes and sizes that the references share."""

import torch
from torch import Tensor

LOWEST = float("-inf")
# Numbers gone through at once on CPU: few enough that the next of several passes finds them in the cache.
CACHED = 2**19


def widened(x: Tensor) -> Tensor:
    """float64 as it is, everything else in float32."""
    return x if x.dtype == torch.float64 else x.float()
