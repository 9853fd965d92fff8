"""Operations on a vocabulary split over tensor-parallel ranks.

Rank r holds `logits_local` [N, w], the columns of token ids [r * w, (r + 1) * w), where w = V_padded / tp.
`vocab` is the real number of tokens; columns from there on are padding and never count. Every rank of the
group must call with the same N. On a group of one nothing is sent. Nothing here is differentiable: gradients
go through the LM head (mcore/head.py).

NaN and +inf are not looked for: one anywhere in a row makes its log-probabilities NaN.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from troll_kernels.numbers import widened

from megatron_troll.parallel.groups import Group


def topk(logits_local: Tensor, k: int, group: Group, vocab: int) -> tuple[Tensor, Tensor]:
    """The k' = min(k, vocab) largest logits of each row, values [N, k'] and token ids [N, k'] int64.

    Exact under ties: value descending, then token id ascending, for any number of shards (ALGORITHMS 1.1).
    -0.0 equals +0.0 and comes out as +0.0; -inf is a value like any other. Not differentiable.

    Holds one [N, V/tp] bool mask, and for the rows tied across the k-th value an int32 one. Sends k
    candidates per row, N x k values and ids, in two all-gathers. Waits for the device once, to find the
    tied rows.
    """
    real = _real_columns(logits_local.detach(), group, vocab)
    values, columns = _candidates(real, min(k, real.shape[1]))
    ids = columns + group.rank * logits_local.shape[1]
    if group.size > 1:
        # A shard with padding may have fewer candidates; the fill comes after every real token.
        missing = min(k, logits_local.shape[1]) - values.shape[1]
        values = torch.nn.functional.pad(values, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(ids, (0, missing), value=vocab)
        values, ids = torch.cat(group.all_gather(values), 1), torch.cat(group.all_gather(ids), 1)
    values, ids = _ordered(values, ids)
    width = min(k, vocab)
    return values[:, :width], ids[:, :width]


def _candidates(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row as values and columns [N, k], in no particular order.

    torch.topk chooses freely among the ties of the k-th value; where there are more of them than places, the
    lowest columns get the places."""
    values, columns = torch.topk(logits, k, sorted=False)
    if k == 0:
        return values, columns
    threshold = values.amin(1, keepdim=True)
    tied = logits == threshold
    rows = (tied.sum(1) > (values == threshold).sum(1)).nonzero()[:, 0]
    above = values[rows] > threshold[rows]
    # The j-th place of a row that a tied value holds goes to the row's j-th lowest tied column.
    turn = ((~above).cumsum(1) - 1).clamp(min=0)
    columns[rows] = torch.where(above, columns[rows], _lowest_columns(tied[rows], k).gather(1, turn))
    return values, columns


def _lowest_columns(mask: Tensor, k: int) -> Tensor:
    """Columns [n, k] of the first k True entries of each row of `mask` [n, V], ascending. Rows with fewer end
    in `V`. Holds an int32 [n, V]."""
    width = mask.shape[1]
    from_the_right = torch.arange(width, 0, -1, dtype=torch.int32, device=mask.device)
    return width - torch.topk(mask * from_the_right, k).values.long()


def _ordered(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Value descending, then id ascending."""
    values = values + 0.0  # -0.0 becomes +0.0, which a radix sort would tell apart
    by_id = ids.argsort(1)
    values, ids = values.gather(1, by_id), ids.gather(1, by_id)
    values, by_value = values.sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def gather_logits(logits_local: Tensor, ids: Tensor, group: Group) -> Tensor:
    """Logits [N, W] at token `ids` [N, W] int64; -inf where the id is NO_ID. Not differentiable; all-reduces
    N x W."""
    width = logits_local.shape[1]
    columns = ids - group.rank * width
    own = (columns >= 0) & (columns < width)
    mine = logits_local.detach().gather(1, columns.masked_fill(~own, 0))
    # The owner's value is the largest, since everyone else offers -inf.
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
