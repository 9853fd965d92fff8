"""From judged samples to figures, a table and eval.json."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_troll.config import Config, EvalSet, Model, Models
from megatron_troll.evals.report import table, write
from megatron_troll.evals.results import Answers, EvalResult, Figure, figures, joined, per_prompt
from megatron_troll.mcore.version import pinned
from megatron_troll.rewards.batch import ScoredBatch
from megatron_troll.types import Prompt, Rollout

# Two prompts, three samples each: reward, vote, length, how it ended.
REWARDS = np.array([1, 0.4, 1, 0, 0.6, 0], dtype=np.float32)
VOTES = ["4", "5", "4", None, "7", "8"]
LENGTHS = [2, 4, 6, 8, 8, 8]
FINISH = ["stop", "stop", "stop", "length", "length", "stop"]


def asked(**changes: Any) -> EvalSet:
    return EvalSet(files=("p.jsonl",), samples=3, pass_at=(1, 2, 3), **changes)


def sample(number: int) -> Rollout:
    tokens = np.zeros(LENGTHS[number])
    prompt = Prompt(f"p{number // 3}", (), "4")
    finish: Any = FINISH[number]
    return Rollout(prompt, number // 3, number % 3, tokens, tokens, tokens, tokens, 0, None, "", finish, 1.0)


def judged(first: int, last: int) -> ScoredBatch:
    return ScoredBatch(
        [sample(i) for i in range(first, last)], *[REWARDS[first:last]] * 2, timeouts=1, crashes=0
    )


def answers(votes: list[str | None] | None) -> Answers:
    return Answers(judged(0, 6), votes)


def test_batches_of_any_size_come_together() -> None:
    whole = joined([Answers(judged(0, 4), VOTES[:4]), Answers(judged(4, 6), VOTES[4:])])
    names = [rollout.name for rollout in whole.judged.rollouts]
    assert names == ["p0#0", "p0#1", "p0#2", "p1#0", "p1#1", "p1#2"]
    assert (whole.judged.reward.tolist(), whole.votes) == (REWARDS.tolist(), VOTES)
    assert whole.judged.timeouts == 2
    assert joined([Answers(judged(0, 4), None), Answers(judged(4, 6), None)]).votes is None


def test_every_figure_of_a_prompt() -> None:
    found = per_prompt(answers(VOTES), asked())
    expected = {
        "mean@3": [0.8, 0.2],
        "pass@1": [2 / 3, 1 / 3],
        "pass@2": [1, 2 / 3],
        "pass@3": [1, 1],
        # {4, 5} ties, {4, 4} and {5, 4}: 1/2, 1, 1/2; {blank, 7}, {blank, 8}, {7, 8}: 1, 0, 1/2
        "maj@2": [2 / 3, 1 / 2],
        "maj@3": [1, 1 / 2],
        "response_length": [4, 8],
        "truncated": [0, 2 / 3],
    }
    assert list(found) == list(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(values), name


def test_what_a_success_is_can_be_set() -> None:
    assert per_prompt(answers(None), asked(success_above=0.6))["pass@1"] == pytest.approx([2 / 3, 1 / 3])
    assert per_prompt(answers(None), asked(success_above=0.0))["pass@1"] == pytest.approx([1, 1 / 3])


def test_without_votes_there_is_no_majority() -> None:
    assert not [name for name in per_prompt(answers(None), asked()) if name.startswith("maj@")]


def test_a_figure_is_the_mean_over_prompts_with_its_interval() -> None:
    found = figures(answers(VOTES), asked(), seed=0)
    assert found["mean@3"].value == pytest.approx(0.5)
    assert (found["mean@3"].low, found["mean@3"].high) == pytest.approx((0.2, 0.8))


RESULT = EvalResult(
    name="hard",
    step=1,
    prompts=1200,
    samples=4,
    figures={"mean@4": Figure(0.5, 0.25, 0.75), "response_length": Figure(100.04, 90, 110)},
    no_majority="reward code extracts no answer to vote on",
    timeouts=3,
    crashes=0,
    errors=2,
    unclosed=1,
)


def test_the_table_says_what_is_missing_and_what_failed() -> None:
    console = Console(width=100, record=True)
    console.print(table([RESULT]))
    words = [line.split() for line in console.export_text().splitlines()]
    assert words == [
        ["data", "set", "prompts", "figure", "value", "95%", "interval"],
        ["hard", "1,200", "x", "4", "mean@4", "0.500", "0.250", "to", "0.750"],
        ["response_length", "100.0", "90.0", "to", "110.0"],
        ["reward", "timeouts", "3"],
        ["reward", "errors", "2"],
        ["unclosed", "reasoning", "1"],
        ["hard:", "no", "maj@k,", "reward", "code", "extracts", "no", "answer", "to", "vote", "on"],
    ]


def test_eval_json_holds_the_figures_and_what_made_them(tmp_path: Path) -> None:
    config = Config(name="e", seed=7, models=Models(policy=Model(path="p")), eval={"hard": asked()})
    write(tmp_path / "eval.json", config, [RESULT])
    content = json.loads((tmp_path / "eval.json").read_text())
    assert content["sets"]["hard"]["figures"]["mean@4"] == {"value": 0.5, "low": 0.25, "high": 0.75}
    assert content["sets"]["hard"]["step"] == 1
    assert content["config"]["eval"]["hard"]["samples"] == 3
    assert content["seed"] == 7
    assert content["versions"]["megatron-core"] == pinned()
