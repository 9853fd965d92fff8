"""Gradient of the hidden states from the gradient of a few logits per row (ALGORITHMS 1.7, 8)."""

from torch import Tensor
from torch.nn.functional import embedding_bag

from troll_kernels.entries import entries, table


def hidden_grad(grad: Tensor, columns: Tensor, weight: Tensor) -> Tensor:
    """dh[n] = sum_w grad[n, w] weight[columns[n, w]], [N, H] in float32 or better.

    grad [N, W] float32 or float64, of raw logits; columns [N, W] int64, below 0 on unused slots; weight
    [V, H]. Sums in float32 or better. Deterministic. Under tensor parallelism each rank sums over its own
    columns, and the caller sums over the ranks. For 16-bit weights holds a float32 copy of the used rows (the
    kernel holds none).
    """
    at = entries(columns)
    rows, place = table(weight, at.columns)
    factors = grad[at.used].to(rows.dtype)
    return embedding_bag(place, rows, at.starts, per_sample_weights=factors, mode="sum")
