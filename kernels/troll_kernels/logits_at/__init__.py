"""Logits at given columns: the K-column forward of the LM head."""

from troll_kernels.dispatch import by_device
from troll_kernels.logits_at import ref

logits_at = by_device(ref.logits_at)

__all__ = ["logits_at"]
