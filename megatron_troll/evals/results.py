"""Figures computed from the answers to a data set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_troll.config import EvalSet
from megatron_troll.evals.estimators import interval, majority_at, pass_at
from megatron_troll.rewards.batch import ScoredBatch, together


@dataclass(frozen=True)
class Answers:
    """Samples, those of one prompt adjacent; votes [B], None if the verifier extracts no answers or no
    maj@k is requested."""

    judged: ScoredBatch
    votes: list[str | None] | None


@dataclass(frozen=True)
class Figure:
    """A mean over prompts with its bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class EvalResult:
    """Results of one data set. `step` is the number under which its rollouts are stored; no_majority: why
    there is no maj@k although it is requested."""

    name: str
    step: int
    prompts: int
    samples: int
    figures: dict[str, Figure]
    no_majority: str | None
    timeouts: int
    crashes: int
    errors: int = 0
    unclosed: int = 0


def joined(parts: Sequence[Answers]) -> Answers:
    """Join the batches of a data set into one."""
    votes = [part.votes for part in parts if part.votes is not None]
    judged = together([part.judged for part in parts])
    return Answers(judged, [vote for some in votes for vote in some] if votes else None)


def figures(answers: Answers, asked: EvalSet, seed: int) -> dict[str, Figure]:
    """Every figure by its name, each a mean over prompts: mean@n of the verifier's reward, pass@k and maj@k
    of success (one above `asked.success_above`), response length in tokens, and the share of responses
    cut at max_tokens. `seed` is for the bootstrap."""
    columns = per_prompt(answers, asked)
    values = np.column_stack(list(columns.values()))
    low, high = interval(values, seed)
    bounds = zip(columns, values.mean(0), low, high)
    return {name: Figure(float(value), float(lower), float(upper)) for name, value, lower, upper in bounds}


def per_prompt(answers: Answers, asked: EvalSet) -> dict[str, np.ndarray]:
    """Figure name -> [P] float64, one value per prompt."""
    samples = asked.samples
    reward, success = (
        values.astype(np.float64).reshape(-1, samples)
        for values in (answers.judged.reward, answers.judged.success)
    )
    success = (success > asked.success_above).astype(np.float64)
    right = success.sum(1).astype(int)
    columns = {f"mean@{samples}": reward.mean(1)}
    columns |= {f"pass@{k}": pass_at(right, samples, k) for k in asked.pass_at}
    if answers.votes is not None:
        votes = [answers.votes[i : i + samples] for i in range(0, len(answers.votes), samples)]
        for k in majorities(asked):
            columns[f"maj@{k}"] = np.array([majority_at(v, s, k) for v, s in zip(votes, success)])
    rollouts = answers.judged.rollouts
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts], dtype=np.float64)
    cut = np.array([rollout.finish == "length" for rollout in rollouts], dtype=np.float64)
    columns["response_length"] = lengths.reshape(-1, samples).mean(1)
    columns["truncated"] = cut.reshape(-1, samples).mean(1)
    return columns


def majorities(asked: EvalSet) -> list[int]:
    """Values of k for maj@k, without 1: a single vote is not a majority."""
    return [k for k in asked.pass_at if k > 1]
