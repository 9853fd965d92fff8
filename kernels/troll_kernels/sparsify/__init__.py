"""Top-K logits to the sparse distributions of TROLL (arXiv 2510.03817, eq. 21)."""

from troll_kernels.sparsify.ref import NO_ID, in_prefix, select, sparse_logp

__all__ = ["NO_ID", "in_prefix", "select", "sparse_logp"]
