"""Gradient of a chunk of logits from the gradients of its row statistics: the elementwise part of the dense
backward."""

from torch import Tensor

from troll_kernels.transform import CACHED, Transform, widened


def to_logits_grad(
    logits: Tensor,
    width: int,
    lse: Tensor,
    mean: Tensor,
    lse_grad: Tensor,
    mean_grad: Tensor | None,
    transform: Transform,
) -> None:
    """Replace raw logits [C, V_local] with the gradient of the loss with respect to them, in place.

    With p = exp(logit - lse), d lse / d logit_v = p_v and d mean / d logit_v = p_v (1 + logit_v - mean):

        grad_v = p_v (lse_grad + mean_grad (1 + logit_v - mean)) d logit_v / d raw_v

    lse, mean [C] are outputs of `row_statistics`, lse_grad, mean_grad [C] their gradients, float32 or better;
    without mean_grad the mean is not differentiated. Columns from `width` on become 0. Computed in float32 or
    better, stored in the dtype of logits. Holds temporaries of half a million numbers, or of one row if that
    is more (the kernel: none).
    """
    logits[:, width:] = 0.0
    step = max(CACHED // max(width, 1), 1)
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        mean_part = None if mean_grad is None else mean_grad[rows]
        real = logits[rows, :width]
        real.copy_(_grad(widened(real), lse[rows], mean[rows], lse_grad[rows], mean_part, transform))


def _grad(
    raw: Tensor,
    lse: Tensor,
    mean: Tensor,
    lse_grad: Tensor,
    mean_grad: Tensor | None,
    transform: Transform,
) -> Tensor:
    transformed = transform.apply(raw)
    grad = (transformed - lse.to(transformed.dtype)[:, None]).exp_()
    if mean_grad is None:
        grad *= lse_grad[:, None]
    else:
        # -inf logits have p = 0, and 0 * inf would be NaN.
        factor = mean_grad[:, None] * (1.0 + transformed - mean[:, None]) + lse_grad[:, None]
        grad *= factor.masked_fill_(grad == 0, 0.0)
    grad *= transform.slope(transformed)
    return grad
