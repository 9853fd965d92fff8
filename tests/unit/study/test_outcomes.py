"""What a run comes to, and how methods are compared over paired seeds."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_troll.study.outcomes import Interval, collapse_step, difference, mean, outcome, survival
from megatron_troll.study.plan import Claim, Study
from megatron_troll.study.report import verdict_of
from megatron_troll.study.results import RunResult

STUDY = Study(name="s", base="b", seeds=(0, 1), threshold=0.7, collapse=0.5)
RESULT = RunResult(
    setting="calm",
    method="clip",
    seed=0,
    before=0.4,
    held_out=(0.5, 0.8, 0.7),
    entropy=(0.3, 0.2, 0.1),
    responses=768,
    tokens=4000,
    updates=12,
    skipped=0,
    seconds=30.0,
    date="2026-01-02",
    digest="0123456789abcdef",
)


def test_the_outcomes_of_a_run() -> None:
    assert outcome("final_success", RESULT, STUDY) == 0.7
    assert outcome("steps_to_threshold", RESULT, STUDY) == 2
    assert outcome("entropy", RESULT, STUDY) == 0.1
    assert outcome("jitter2", RESULT, STUDY) == pytest.approx((0.2 + 0.4) / 2)
    assert outcome("collapses", RESULT, STUDY) == 0


def test_a_run_that_never_gets_there_counts_one_step_more() -> None:
    assert outcome("steps_to_threshold", replace(RESULT, held_out=(0.5, 0.6, 0.69)), STUDY) == 4


@pytest.mark.parametrize(
    ("curve", "collapsed"),
    [((0.5, 0.8, 0.39), 1), ((0.5, 0.8, 0.4), 0), ((0.1, 0.1, 0.1), 1), ((0.5, 0.8, None), 1)],
)
def test_a_collapse_is_measured_from_the_best_success_the_warm_start_included(
    curve: tuple[float | None, ...], collapsed: int
) -> None:
    assert outcome("collapses", replace(RESULT, held_out=curve), STUDY) == collapsed


def run(*curve: float | None) -> RunResult:
    return replace(RESULT, held_out=curve)


@pytest.mark.parametrize(
    ("curve", "step"),
    [
        ((0.8, 0.3, 0.2), 2),
        ((0.8, 0.3, 0.4), None),
        ((0.8, 0.3, 0.6, 0.1), 4),
        ((0.1, 0.3, 0.9, 0.44), 4),
        ((None, None, None), 1),
        ((0.1, 0.9, 0.9, 0.9), None),
    ],
)
def test_a_run_collapses_at_the_step_from_which_on_it_stays_low(
    curve: tuple[float | None, ...], step: int | None
) -> None:
    assert collapse_step(run(*curve), STUDY) == step
    assert outcome("collapses", run(*curve), STUDY) == (step is not None)


def test_survival_falls_with_every_run_that_collapses_and_ends_at_those_that_do_not() -> None:
    runs = [run(0.8, 0.3, 0.2), run(0.8, 0.8, 0.1), run(0.8, 0.3, 0.8), run(0.5, 0.5, 0.5)]
    assert survival(runs, STUDY) == [1.0, 1.0, 0.75, 0.5]
    collapsed = [outcome("collapses", one, STUDY) for one in runs]
    assert survival(runs, STUDY)[-1] == 1 - sum(collapsed) / len(runs)


def test_differences_are_paired_by_seed() -> None:
    rng = np.random.default_rng(1)
    luck = rng.normal(0.5, 0.2, 5)

    def runs(gain: float, seeds: range) -> list[RunResult]:
        return [replace(RESULT, seed=seed, held_out=(0.0, 0.0, luck[seed] + gain)) for seed in seeds]

    found = difference(runs(0.1, range(5)), runs(0.0, range(1, 5)), lambda run: run.held_out[-1] or 0.0)
    assert found is not None
    assert found.mean == pytest.approx(0.1)
    # The luck of the seeds is in both, so it is not in the interval.
    assert found.high - found.low < 1e-9
    assert difference(runs(0.1, range(1)), runs(0.0, range(5)), lambda run: 0.0) is None


def test_the_interval_is_that_of_the_bootstrap_distribution() -> None:
    """Of two values, the resampled mean is low, middle or high with probability 1/4, 1/2, 1/4."""
    assert mean([0.0, 1.0]) == Interval(0.5, 0.0, 1.0)
    many = mean(np.random.default_rng(0).normal(0, 1, 400).tolist())
    assert many.high - many.low == pytest.approx(2 * 1.96 / 20, rel=0.1)


@pytest.mark.parametrize(
    ("interval", "expect", "verdict"),
    [
        (Interval(0.2, 0.1, 0.3), "higher", "as claimed"),
        (Interval(0.2, 0.1, 0.3), "lower", "**the opposite**"),
        (Interval(-0.2, -0.3, -0.1), "lower", "as claimed"),
        (Interval(0.1, -0.1, 0.3), "higher", "did not show"),
        (Interval(0.0, 0.0, 0.0), "higher", "did not show"),
    ],
)
def test_a_claim_shows_where_the_whole_interval_is_on_its_side(
    interval: Interval, expect: str, verdict: str
) -> None:
    fields = {"claim": "c", "setting": "calm", "outcome": "entropy", "a": "x", "b": "y", "expect": expect}
    assert verdict_of(Claim.model_validate(fields), interval) == verdict
