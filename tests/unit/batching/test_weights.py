"""Token weights are normalised over the loss tokens of a whole step."""

import pytest

from megatron_troll.batching.plan import step_weights
from tests.unit.batching.samples import rollout

ROLLOUTS = [
    rollout([1], [2, 3, 4, 5], mask=[1, 0, 0, 1]),
    rollout([1], [2, 3], mask=[0, 0]),
    rollout([1], [2, 3, 4]),
    rollout([1], [2]),
]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token-mean", [1 / 5, 0, 1 / 5, 0]),
        ("seq-mean-token-mean", [1 / 4, 0, 1 / 6, 0]),
        ("seq-mean-token-sum-norm", [1 / 30, 0, 1 / 30, 0]),
    ],
)
def test_other_steps_do_not_count_and_a_masked_rollout_is_empty(
    aggregation: str, expected: list[float]
) -> None:
    weights = step_weights(ROLLOUTS, [0, 1, 2], aggregation, l_max=10)  # pyright: ignore[reportArgumentType]
    assert weights == pytest.approx(expected)


def test_a_step_without_loss_tokens_has_no_weight() -> None:
    assert step_weights(ROLLOUTS, [1], "token-mean", None) == [0.0] * 4
