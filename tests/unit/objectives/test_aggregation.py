import pytest

from megatron_troll.objectives import token_weights


def total(lengths: list[int], weights: list[float]) -> float:
    return sum(n * w for n, w in zip(lengths, weights))


def test_token_mean():
    assert token_weights([3, 1], "token-mean") == [0.25, 0.25]


def test_seq_mean_drops_empty_responses():
    weights = token_weights([2, 0, 3], "seq-mean-token-mean")
    assert weights == pytest.approx([1 / 4, 0, 1 / 6])
    assert total([2, 0, 3], weights) == pytest.approx(1.0)


def test_sum_norm_counts_empty_responses_and_keeps_its_constant():
    assert token_weights([4, 0, 1], "seq-mean-token-sum-norm", 8) == pytest.approx([1 / 24, 0, 1 / 24])


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
def test_nothing_to_average(aggregation):
    assert token_weights([0, 0], aggregation) == [0.0, 0.0]
    assert token_weights([], aggregation) == []


def test_bad_settings():
    with pytest.raises(ValueError, match="needs l_max >= 1"):
        token_weights([1], "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="known: token-mean"):
        token_weights([1], "mean")  # pyright: ignore[reportArgumentType]
