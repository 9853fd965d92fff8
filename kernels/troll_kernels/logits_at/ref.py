"""Logits at a few columns per row, without computing the whole row (ALGORITHMS 8, `support: old`)."""

import torch
from torch import Tensor

from troll_kernels.entries import entries, table
from troll_kernels.transform import LOWEST


def logits_at(hidden: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Raw logits [N, W], hidden[n] . weight[columns[n, w]], in float32 or better; -inf where the column is
    below 0.

    hidden [N, H], weight [V, H] of one dtype, columns [N, W] int64; a column may repeat. Sums over H in
    float32 or better for every dtype. Holds N x W; for 16-bit weights also a float32 copy of the used rows
    (the kernel holds none). Not differentiable; `head.sparse_logits` is.
    """
    at = entries(columns)
    rows, place = table(weight.detach(), at.columns)
    out = torch.full(columns.shape, LOWEST, dtype=rows.dtype, device=rows.device)
    # The logit of a slot is the gradient of a weighted sum of rows with respect to the slot's weight, with
    # the hidden state as the upstream gradient.
    with torch.enable_grad():
        ones = torch.ones_like(place, dtype=rows.dtype).requires_grad_()
        sums = torch.nn.functional.embedding_bag(place, rows, at.starts, per_sample_weights=ones, mode="sum")
    (out[at.used],) = torch.autograd.grad(sums, ones, hidden.detach().to(rows.dtype))
    return out
