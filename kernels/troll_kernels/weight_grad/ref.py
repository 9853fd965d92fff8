"""Gradient of the LM-head weight from the gradient of a few logits per row (ALGORITHMS 1.7, 8)."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from troll_kernels.entries import entries
from troll_kernels.transform import widened


def add_weight_grad(main_grad: Tensor, grad: Tensor, columns: Tensor, hidden: Tensor) -> None:
    """main_grad[v] += sum over (n, w) with columns[n, w] = v of grad[n, w] hidden[n], in place.

    main_grad [V, H] float32 or float64, rows contiguous; grad [N, W] float32 or float64, of raw logits;
    columns [N, W] int64, below 0 on unused slots; hidden [N, H]. Deterministic: entries are sorted
    by column and summed in order of (n, w). Holds the U x H rows that get a gradient (the kernel: 2 rows for
    every 128 entries).
    """
    at = entries(columns)
    row = torch.arange(len(columns), device=columns.device)[:, None].expand_as(columns)[at.used]
    by_column = at.columns.argsort(stable=True)
    touched, length = at.columns[by_column].unique_consecutive(return_counts=True)
    sums = embedding_bag(
        row[by_column],
        widened(hidden).to(main_grad.dtype),
        length.cumsum(0) - length,
        per_sample_weights=grad[at.used][by_column].to(main_grad.dtype),
        mode="sum",
    )
    main_grad.index_add_(0, touched, sums)
