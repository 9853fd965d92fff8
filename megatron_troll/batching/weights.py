"""Aggregation weights of one optimizer step, from the loss tokens of all its responses."""

from collections.abc import Sequence

from megatron_troll.objectives.aggregation import Aggregation, token_weights
from megatron_troll.types import Rollout


def step_weights(
    rollouts: Sequence[Rollout], responses: Sequence[int], aggregation: Aggregation, l_max: int | None
) -> list[float]:
    """The weight of each loss token of each rollout, one number per rollout of the whole batch.

    `responses` are the rollouts of the step on all ranks: normalisation is global (ALGORITHMS 0). Rollouts of
    other steps have weight 0. One whose mask is 0 throughout counts as an empty response.
    """
    lengths = [int(rollouts[i].mask.sum()) for i in responses]
    weights = [0.0] * len(rollouts)
    for i, weight in zip(responses, token_weights(lengths, aggregation, l_max)):
        weights[i] = weight
    return weights
