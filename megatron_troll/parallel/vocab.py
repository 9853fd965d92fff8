"""Operations on a vocabulary split over tensor-parallel ranks.

Rank r holds `logits_local` [N, w], the columns of token ids [r * w, (r + 1) * w), where w = V_padded / tp.
`vocab` is the real number of tokens; columns from there on are padding and never count. Every rank of the
group must call with the same N. Results are the same on every rank. On a group of one nothing is sent.

Backward of each function gives a rank the gradient of its own columns and communicates nothing: the upstream
gradient is the same on every rank, because every rank computes the same loss from the same result.

NaN and +inf are not looked for: one anywhere in a row makes its logsumexp and its log-probs NaN.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

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


def logsumexp(logits_local: Tensor, group: Group, vocab: int) -> Tensor:
    """log sum_v exp(logits) [N] over the real vocabulary, float32 or better. Differentiable.

    Forward holds one [N, V/tp] temporary and all-reduces N floats twice. Saved for backward: the logits
    themselves and N floats; backward makes the gradient [N, V/tp]. A row of nothing but -inf gives -inf.
    """
    return _apply(_LogSumExp, logits_local, group, vocab)


def gather_logits(logits_local: Tensor, ids: Tensor, group: Group) -> Tensor:
    """Logits [N, W] at token `ids` [N, W] int64; -inf where the id is NO_ID. Differentiable.

    All-reduces N x W. Backward makes the dense gradient [N, V/tp]; ids may repeat within a row.
    """
    return _apply(_GatherLogits, logits_local, ids, group)


def log_prob(logits_local: Tensor, targets: Tensor, group: Group, vocab: int) -> Tensor:
    """log softmax(logits)[targets] [N], float32 or better, for `targets` [N] int64. Differentiable.

    Forward holds one [N, V/tp] temporary and all-reduces N floats three times; backward makes the one
    gradient [N, V/tp], where `gather_logits` less `logsumexp` would make two.
    """
    return _apply(_LogProb, logits_local, targets, group, vocab)


def entropy(logits_local: Tensor, lse: Tensor, group: Group, vocab: int) -> Tensor:
    """-sum_v p_v log p_v [N] in nats, float32 or better, with p = exp(logits - lse). Differentiable.

    `lse` [N] must be the logsumexp of the same logits. It is read as a number: the gradient through it is
    part of the closed form dH/dlogit_v = -p_v (log p_v + H). Forward holds two [N, V/tp] temporaries and
    all-reduces N floats; saved for backward: the logits and 2 N floats. Backward holds three [N, V/tp].
    """
    return _apply(_Entropy, logits_local, lse.detach(), group, vocab)


def kl(logits_local: Tensor, lse: Tensor, reference_local: Tensor, group: Group, vocab: int) -> Tensor:
    """KL(p || reference) [N] in nats, float32 or better, with p = exp(logits - lse). Differentiable in the
    logits.

    `lse` [N] must be the logsumexp of the same logits and is read as a number; `reference_local` [N, V/tp]
    are log-probabilities, and where one is -inf so must be p. Gradient: dKL/dlogit_v = p_v (log p_v -
    reference_v - KL). Forward holds three [N, V/tp] temporaries and all-reduces N floats; saved for backward:
    logits, reference and 2 N floats. Backward holds three [N, V/tp].
    """
    return _apply(_Kl, logits_local, lse.detach(), reference_local, group, vocab)


class _LogSumExp(Function):
    @staticmethod
    def forward(ctx: Any, logits_local: Tensor, group: Group, vocab: int) -> Tensor:
        real = _real_columns(logits_local, group, vocab)
        lse = _logsumexp(real, group)
        ctx.save_for_backward(logits_local, lse)
        ctx.real_width = real.shape[1]
        return lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None]:
        logits_local, lse = ctx.saved_tensors
        grad = _probabilities(logits_local, lse, ctx.real_width)
        return (grad * upstream[:, None]).to(logits_local.dtype), None, None


class _GatherLogits(Function):
    @staticmethod
    def forward(ctx: Any, logits_local: Tensor, ids: Tensor, group: Group) -> Tensor:
        columns, own = _own_columns(ids, logits_local.shape[1], group)
        ctx.save_for_backward(columns, own)
        ctx.shape, ctx.dtype = logits_local.shape, logits_local.dtype
        return _gather(logits_local, columns, own, group)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None]:
        columns, own = ctx.saved_tensors
        grad = upstream.new_zeros(ctx.shape).scatter_add_(1, columns, upstream.masked_fill(~own, 0.0))
        return grad.to(ctx.dtype), None, None


class _LogProb(Function):
    @staticmethod
    def forward(ctx: Any, logits_local: Tensor, targets: Tensor, group: Group, vocab: int) -> Tensor:
        real = _real_columns(logits_local, group, vocab)
        columns, own = _own_columns(targets[:, None], logits_local.shape[1], group)
        lse = _logsumexp(real, group)
        ctx.save_for_backward(logits_local, lse, columns, own)
        ctx.real_width = real.shape[1]
        return _gather(logits_local, columns, own, group)[:, 0].to(lse.dtype) - lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits_local, lse, columns, own = ctx.saved_tensors
        grad = _probabilities(logits_local, lse, ctx.real_width).mul_(-upstream[:, None])
        grad.scatter_add_(1, columns, upstream[:, None] * own)
        return grad.to(logits_local.dtype), None, None, None


class _Entropy(Function):
    @staticmethod
    def forward(ctx: Any, logits_local: Tensor, lse: Tensor, group: Group, vocab: int) -> Tensor:
        width = _real_columns(logits_local, group, vocab).shape[1]
        entropy = group.all_reduce(torch.special.entr(_probabilities(logits_local, lse, width)).sum(1))
        ctx.save_for_backward(logits_local, lse, entropy)
        ctx.real_width = width
        return entropy

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None, None]:
        logits_local, lse, entropy = ctx.saved_tensors
        p = _probabilities(logits_local, lse, ctx.real_width)
        grad = (torch.special.entr(p) - p * entropy[:, None]) * upstream[:, None]
        return grad.to(logits_local.dtype), None, None, None


class _Kl(Function):
    @staticmethod
    def forward(
        ctx: Any, logits_local: Tensor, lse: Tensor, reference_local: Tensor, group: Group, vocab: int
    ) -> Tensor:
        ctx.real_width = _real_columns(logits_local, group, vocab).shape[1]
        p = _probabilities(logits_local, lse, ctx.real_width)
        total = group.all_reduce((p * _log_ratio(logits_local, lse, reference_local, p)).sum(1))
        ctx.save_for_backward(logits_local, lse, reference_local, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        logits_local, lse, reference_local, total = ctx.saved_tensors
        p = _probabilities(logits_local, lse, ctx.real_width)
        grad = p * (_log_ratio(logits_local, lse, reference_local, p) - total[:, None]) * upstream[:, None]
        return grad.to(logits_local.dtype), None, None, None, None


def _log_ratio(logits_local: Tensor, lse: Tensor, reference_local: Tensor, p: Tensor) -> Tensor:
    """log p - reference [N, V/tp], 0 where p is 0."""
    return torch.where(p > 0, _wide(logits_local) - lse[:, None] - reference_local, 0.0)


def _apply(function: type[Function], *args: Any) -> Tensor:
    result = function.apply(*args)
    assert isinstance(result, Tensor)
    return result


def log_softmax(logits_local: Tensor, group: Group, vocab: int) -> Tensor:
    """Log-probabilities of this shard [N, V/tp], -inf on padding columns. Not differentiable. Two all-reduces
    of N numbers."""
    logits_local = logits_local.detach()
    logp = logits_local - logsumexp(logits_local, group, vocab)[:, None]
    logp[:, _real_columns(logp, group, vocab).shape[1] :] = -torch.inf
    return logp


def _real_columns(logits_local: Tensor, group: Group, vocab: int) -> Tensor:
    """View of the columns of this shard that are real tokens; may have no column."""
    width = logits_local.shape[1]
    return logits_local[:, : min(max(vocab - group.rank * width, 0), width)]


def _own_columns(ids: Tensor, width: int, group: Group) -> tuple[Tensor, Tensor]:
    """Local columns of `ids` [N, W], and which are this rank's; the others (NO_ID too) become column 0."""
    columns = ids - group.rank * width
    own = (columns >= 0) & (columns < width)
    return columns.masked_fill(~own, 0), own


def _gather(logits_local: Tensor, columns: Tensor, own: Tensor, group: Group) -> Tensor:
    """[N, W]: the owner's value is the largest, since everyone else offers -inf."""
    values = logits_local.gather(1, columns).masked_fill(~own, -torch.inf)
    return group.all_reduce(values, dist.ReduceOp.MAX)


def _logsumexp(real: Tensor, group: Group) -> Tensor:
    real = _wide(real)
    top = real.amax(1) if real.shape[1] else real.new_full((real.shape[0],), -torch.inf)
    top = group.all_reduce(top, dist.ReduceOp.MAX)
    shift = top.masked_fill(top == -torch.inf, 0.0)
    mass = group.all_reduce((real - shift[:, None]).exp_().sum(1))
    return shift + mass.log()


def _probabilities(logits_local: Tensor, lse: Tensor, real_width: int) -> Tensor:
    """exp(logits - lse) [N, V/tp], newly made; 0 on padded columns."""
    p = (_wide(logits_local) - lse[:, None]).exp_()
    p[:, real_width:] = 0.0
    return p


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
