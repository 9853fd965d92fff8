"""pass@k and maj@k against all subsets, and what the interval covers."""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest

from megatron_troll.evals.estimators import CONFIDENCE, interval, majority_at, pass_at

VOTES = [
    ["4", "4", "5", "6", None, "6"],
    ["4", "5", "6", "7", "8", "9"],
    [None, None, "4", None, "5", None],
    ["4", "4", "4", "4", "4", "4"],
    [None, None, None, None, None, None],
    ["4", "4", "4", "5", "5", "5"],
]
SUCCESS = [1.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def majority(votes: Sequence[str | None], worth: dict[str | None, Fraction]) -> Fraction:
    """What the majority of exactly these votes is worth."""
    counts = Counter(vote for vote in votes if vote is not None)
    winners = [vote for vote, count in counts.items() if count == max(counts.values())]
    return sum((worth[winner] for winner in winners), Fraction(0)) / max(1, len(winners))


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("right", range(7))
def test_pass_at_k_is_the_share_of_subsets_with_a_success(right: int, k: int) -> None:
    subsets = list(combinations([1] * right + [0] * (6 - right), k))
    expected = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at(np.array([right]), 6, k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_cancels() -> None:
    found = pass_at(np.array([1, 5_000]), 10_000, 100)
    missed = Fraction(math.comb(5_000, 100), math.comb(10_000, 100))
    assert found == pytest.approx([0.01, float(1 - missed)], rel=1e-12)


@pytest.mark.parametrize("k", range(1, 7))
@pytest.mark.parametrize("votes", VOTES)
def test_majority_at_k_is_the_mean_over_all_subsets(votes: list[str | None], k: int) -> None:
    given: dict[str | None, list[int]] = {}
    for vote, success in zip(votes, SUCCESS):
        given.setdefault(vote, []).append(int(success))
    worth = {vote: Fraction(sum(found), len(found)) for vote, found in given.items()}
    subsets = list(combinations(votes, k))
    expected = sum((majority(subset, worth) for subset in subsets), Fraction(0)) / len(subsets)
    assert majority_at(votes, np.array(SUCCESS), k) == pytest.approx(float(expected), abs=1e-12)


def test_the_majority_of_all_samples_is_a_plain_count() -> None:
    votes = ["4"] * 300 + ["5"] * 299 + [None] * 600
    assert majority_at(votes, np.array([vote == "4" for vote in votes]), 1_199) == pytest.approx(1.0)


def test_the_majority_of_one_sample_is_its_own_success() -> None:
    votes = ["4"] * 30 + ["5"] * 70
    assert majority_at(votes, np.array([vote == "4" for vote in votes]), 1) == pytest.approx(0.3, rel=1e-12)


def test_more_votes_help_the_more_frequent_answer() -> None:
    votes = ["4"] * 6 + ["5"] * 4
    success = np.array([vote == "4" for vote in votes])
    curve = [majority_at(votes, success, k) for k in (1, 3, 5, 7, 9, 10)]
    assert curve == sorted(curve)
    assert curve[-1] == pytest.approx(1.0)


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    # Each column is a sample of its own: columns share resamples, which only correlates their intervals.
    values = (np.random.default_rng(0).random((100, 400)) < 0.3).astype(float)
    low, high = interval(values, seed=0)
    assert ((low <= 0.3) & (high >= 0.3)).mean() == pytest.approx(CONFIDENCE, abs=0.03)


def test_the_interval_is_that_of_its_seed_and_of_each_column() -> None:
    values = np.column_stack([np.arange(50.0), np.arange(50.0) * 2, np.ones(50)])
    low, high = interval(values, seed=1)
    assert interval(values, seed=1).tolist() == [low.tolist(), high.tolist()]
    assert (interval(values, seed=2) != interval(values, seed=1)).any()
    assert low[1] == pytest.approx(2 * low[0])
    assert low[0] < 24.5 < high[0]
    assert (low[2], high[2]) == (1.0, 1.0)
