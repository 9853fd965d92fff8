"""Exact top-K: value descending, column ascending."""

from troll_kernels.dispatch import by_device
from troll_kernels.topk import ref
from troll_kernels.topk.ref import largest

top_k = by_device(ref.top_k)

__all__ = ["largest", "top_k"]
