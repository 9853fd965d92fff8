"""Logsumexp, mean logit, target logit and tile maxima of rows of logits, in one pass."""

from troll_kernels.dispatch import by_device
from troll_kernels.rows import ref
from troll_kernels.rows.ref import RowStatistics

row_statistics = by_device(ref.row_statistics)

__all__ = ["RowStatistics", "row_statistics"]
