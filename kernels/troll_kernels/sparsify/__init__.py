"""Turn top-K logits into the sparse distributions of TROLL (arXiv 2510.03817, eq. 21)."""

from troll_kernels.dispatch import by_device
from troll_kernels.sparsify import ref
from troll_kernels.sparsify.ref import NO_ID

in_prefix = by_device(ref.in_prefix)
select = by_device(ref.select)
sparse_logp = by_device(ref.sparse_logp)

__all__ = ["NO_ID", "in_prefix", "select", "sparse_logp"]
