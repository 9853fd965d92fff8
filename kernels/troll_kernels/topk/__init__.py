"""Exact top-K: value descending, column ascending."""

from troll_kernels.dispatch import by_device
from troll_kernels.topk import ref

top_k = by_device(ref.top_k)

__all__ = ["top_k"]
