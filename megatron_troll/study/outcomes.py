"""Outcomes of a run, and differences between two methods over the seeds they share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_troll.observe.runs import jitter2
from megatron_troll.study.plan import Outcome, Study
from megatron_troll.study.results import RunResult

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the ends of its bootstrap interval."""

    mean: float
    low: float
    high: float


def outcome(name: Outcome, result: RunResult, study: Study) -> float:
    """One number for one run. A success that is not finite counts as 0; steps_to_threshold of a run that
    never reaches it is the number of its steps plus 1; collapses is 1 or 0."""
    curve = [value or 0.0 for value in result.held_out]
    match name:
        case "final_success":
            return curve[-1]
        case "steps_to_threshold":
            reached = [step for step, value in enumerate(curve, start=1) if value >= study.threshold]
            return float(reached[0] if reached else len(curve) + 1)
        case "jitter2":
            return jitter2([result.before, *curve]) or 0.0
        case "entropy":
            return result.entropy[-1] or 0.0
        case "collapses":
            return float(collapse_step(result, study) is not None)


def collapse_step(result: RunResult, study: Study) -> int | None:
    """The step at which a run collapses: from it to the end, held-out success stays below the study's share
    of the run's best, the warm start included. None if it does not collapse."""
    curve = [result.before, *(value or 0.0 for value in result.held_out)]
    fine = [step for step, value in enumerate(curve) if value >= study.collapse * max(curve)]
    return None if fine[-1] == len(curve) - 1 else fine[-1] + 1


def survival(runs: Sequence[RunResult], study: Study) -> list[float]:
    """The share of the runs that have not collapsed by step 0, 1, ...; all have equally many steps."""
    ends = [collapse_step(run, study) for run in runs]
    steps = range(len(runs[0].held_out) + 1)
    return [sum(end is None or step < end for end in ends) / len(runs) for step in steps]


def mean(values: Sequence[float]) -> Interval:
    """Mean and percentile bootstrap interval over the values; with five values it is somewhat too narrow."""
    sample = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(sample), (RESAMPLES, len(sample)))
    low, high = np.quantile(sample[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def difference(
    a: Sequence[RunResult], b: Sequence[RunResult], of: Callable[[RunResult], float]
) -> Interval | None:
    """Mean of a - b over the seeds that both have; None if they share fewer than two."""
    other = {result.seed: result for result in b}
    pairs = [of(result) - of(other[result.seed]) for result in a if result.seed in other]
    return mean(pairs) if len(pairs) > 1 else None
