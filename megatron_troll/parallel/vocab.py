"""Operations on a vocabulary split over tensor-parallel ranks.

Rank r holds `logits_local` [N, w], the columns of token ids [r * w, (r + 1) * w), where w = V_padded / tp.
`vocab` is the real number of tokens; columns from `vocab` on are padding and are ignored. Every rank of the
group must call with the same N. On a group of one nothing is sent. Nothing here is differentiable: gradients
go through the LM head (mcore/head.py).

There is no check for NaN and +inf: one anywhere in a row makes its log-probabilities NaN.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from troll_kernels.transform import widened

from megatron_troll.parallel.groups import Group


def gather_logits(logits_local: Tensor, ids: Tensor, group: Group) -> Tensor:
    """Logits [N, W] at token `ids` [N, W] int64; -inf where the id is NO_ID. Not differentiable; all-reduces
    N x W."""
    width = logits_local.shape[1]
    columns = ids - group.rank * width
    own = (columns >= 0) & (columns < width)
    mine = logits_local.detach().gather(1, columns.masked_fill(~own, 0))
    # The owner's value is the largest, because every other rank has -inf.
    return group.all_reduce(mine.masked_fill(~own, -torch.inf), dist.ReduceOp.MAX)


def log_softmax(logits_local: Tensor, group: Group, vocab: int) -> Tensor:
    """Log-probabilities of this shard [N, V/tp], -inf on padding columns. Not differentiable. Two all-reduces
    of N numbers."""
    logits_local = logits_local.detach()
    logp = logits_local - _logsumexp(_real_columns(logits_local, group, vocab), group)[:, None]
    logp[:, _real_columns(logp, group, vocab).shape[1] :] = -torch.inf
    return logp


def _real_columns(logits_local: Tensor, group: Group, vocab: int) -> Tensor:
    """View of the columns of this shard that are real tokens; may have no column."""
    width = logits_local.shape[1]
    return logits_local[:, : min(max(vocab - group.rank * width, 0), width)]


def _logsumexp(real: Tensor, group: Group) -> Tensor:
    real = widened(real)
    top = real.amax(1) if real.shape[1] else real.new_full((real.shape[0],), -torch.inf)
    top = group.all_reduce(top, dist.ReduceOp.MAX)
    shift = top.masked_fill(top == -torch.inf, 0.0)
    mass = group.all_reduce((real - shift[:, None]).exp_().sum(1))
    return shift + mass.log()


def kl(logp: Tensor, logq: Tensor, group: Group) -> Tensor:
    """KL(p || q) [M] from shards [M, V / tp] of their log-probabilities. One all-reduce of M numbers."""
    terms = torch.where(logp > -torch.inf, logp.exp() * (logp - logq), 0.0)
    return group.all_reduce(terms.sum(1))
