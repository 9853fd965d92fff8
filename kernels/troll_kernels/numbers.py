"""Dtypes and sizes that the references share."""

import torch
from torch import Tensor

LOWEST = float("-inf")
# Elements processed at once on CPU: few enough to stay in the cache over several passes.
CACHED = 2**19


def widened(x: Tensor) -> Tensor:
    """Return float64 tensors unchanged, all others in float32."""
    return x if x.dtype == torch.float64 else x.float()
