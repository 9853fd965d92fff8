"""Token weights that average an optimizer step, over all ranks, into one objective (ALGORITHMS 0)."""

from collections.abc import Sequence
from typing import Literal, get_args

Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


def token_weights(lengths: Sequence[int], aggregation: Aggregation, l_max: int | None = None) -> list[float]:
    """The weight of one token of each response, for every response of an optimizer step on all ranks.

    lengths: tokens of each response that carry loss; an empty response (0) has weight 0, which no token uses.
    token-mean: 1 / all tokens. seq-mean-token-mean: 1 / (non-empty responses * own length).
    seq-mean-token-sum-norm: 1 / (responses * l_max), counting empty ones; l_max is constant over the run.
    """
    if aggregation not in get_args(Aggregation):
        raise ValueError(f"unknown aggregation {aggregation!r}; known: {', '.join(get_args(Aggregation))}")
    if aggregation == "token-mean":
        total = sum(lengths)
        return [1.0 / total if length else 0.0 for length in lengths]
    if aggregation == "seq-mean-token-mean":
        filled = sum(length > 0 for length in lengths)
        return [1.0 / (filled * length) if length else 0.0 for length in lengths]
    if l_max is None or l_max < 1:
        raise ValueError(f"seq-mean-token-sum-norm needs l_max >= 1 (objective.sum_norm_length), not {l_max}")
    return [1.0 / (len(lengths) * l_max) if length else 0.0 for length in lengths]
