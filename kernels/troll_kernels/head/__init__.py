"""The LM head of one vocabulary shard: computes what an objective reads, in chunks of tokens.

All functions handle a single shard; the caller combines the results of several with ordinary autograd. No
function holds N x V.
"""

from troll_kernels.head.candidates import Candidates, candidates
from troll_kernels.head.dense import DenseStatistics, dense_statistics
from troll_kernels.head.shard import Shard, chunk_size
from troll_kernels.head.sparse import sparse_logits

__all__ = [
    "Candidates",
    "DenseStatistics",
    "Shard",
    "candidates",
    "chunk_size",
    "dense_statistics",
    "sparse_logits",
]
