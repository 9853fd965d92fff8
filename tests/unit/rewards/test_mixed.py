"""Answers of a batch from several sources, each judged by the reward of its source."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from megatron_troll.config import ConfigError, Overlong, RewardConfig
from megatron_troll.parallel.groups import Group
from megatron_troll.rewards.batch import judge
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.rewards.reward import Reward
from megatron_troll.rewards.terms import Judges, resolve, terms
from megatron_troll.types import Prompt, Rollout
from tests.unit.rewards.test_score import PLUGINS, rollout

REWARDS = {
    "exact": RewardConfig(name="exact", overlong=Overlong(mode="mask")),
    "found": RewardConfig(name="regex", pattern="12"),
    "raises": RewardConfig(name=PLUGINS + ":Obeys"),
}


def of(source: str, text: str, **fields: Any) -> Rollout:
    one = rollout(text, **fields)
    return replace(one, prompt=replace(one.prompt, source=source))


def test_each_source_is_judged_by_its_own_reward() -> None:
    answers = [
        of("found", "so 12"),
        of("exact", "so 12"),
        of("found", "13"),
        of("exact", "12", finish="length"),
    ]
    with MixedScorer(REWARDS) as scorer:
        judged = judge(scorer, answers, Group(None, 0, 1), print)
    assert judged.reward.tolist() == [1, 0, 0, 1]
    assert judged.metrics["success"] == 0.5
    assert (judged.metrics["success/found"], judged.metrics["success/exact"]) == (0.5, 0.5)
    assert "success/raises" not in judged.metrics


def test_what_one_reward_does_wrong_costs_only_its_own_answers() -> None:
    said: list[str] = []
    with MixedScorer(REWARDS, workers=1) as scorer:
        judged = judge(scorer, [of("raises", "raise"), of("exact", "12")], Group(None, 0, 1), said.append)
    assert (judged.reward.tolist(), judged.errors) == ([0, 1], 1)
    assert "plugin_rewards:Obeys' failed on" in said[0]


def test_votes_of_every_source() -> None:
    votes = {name: REWARDS[name] for name in ("exact", "found")}
    with MixedScorer(votes) as scorer:
        assert scorer.has_votes
        assert scorer.votes([of("found", "so 12"), of("exact", " 7 ")]).votes == ["12", "7"]
    with MixedScorer(REWARDS) as scorer:
        assert not scorer.has_votes


def test_sources_with_equal_rewards_share_their_processes() -> None:
    named = RewardConfig(name=PLUGINS + ":NamesItsProcess")
    with MixedScorer({"a": named, "b": named}, workers=1) as scorer:
        scores = scorer.score([of("a", ""), of("b", "")])
    assert scores.reward[0] == scores.reward[1]


def test_an_unknown_verifier_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        MixedScorer({"": RewardConfig(name="exat")})


def sum_of(*, success: str | None = None, **fields: Any) -> RewardConfig:
    """exact, twice as heavy as a pattern; the pattern sees the reasoning too."""
    parts = {
        "right": {"name": "exact", "weight": 2.0},
        "form": {
            "name": "regex",
            "pattern": "<think>1(2)",
            "ignore": "x",
            "weight": -0.5,
            "reasoning": "keep",
        },
    }
    return RewardConfig.model_validate({"name": "sum", "parts": parts, "success": success} | fields)


def test_a_sum_of_weighted_rewards_logs_each_and_one_of_them_is_the_success() -> None:
    answers = [
        of("", "<think>12</think>2", answer="2"),
        of("", "2", answer="2"),
        of("", "<think>12", answer="2"),
    ]
    with MixedScorer({"": sum_of()}) as scorer:
        judged = judge(scorer, answers, Group(None, 0, 1), print)
        assert scorer.has_votes
        assert scorer.votes(answers).votes == ["2", "2", None]
    assert judged.reward.tolist() == [1.5, 2.0, -0.5]
    assert judged.success.tolist() == [1, 1, 0]
    assert judged.parts["form"].tolist() == [1, 0, 1]
    expected = {"success": 2 / 3, "reward": 1.0, "reward/right": 2 / 3, "reward/form": 2 / 3}
    assert {name: judged.metrics[name] for name in expected} == pytest.approx(expected)
    assert judged.unclosed == 1
    with MixedScorer({"": sum_of(success="form")}) as scorer:
        assert scorer.score(answers).success.tolist() == [1, 0, 1]


def test_parts_are_those_of_the_sources_that_have_them() -> None:
    answers = [of("plain", "2", answer="2"), of("summed", "<think>12</think>3", answer="2")]
    with MixedScorer({"plain": REWARDS["found"], "summed": sum_of()}) as scorer:
        scores = scorer.score(answers)
        metrics = judge(scorer, answers, Group(None, 0, 1), print).metrics
    assert np.isnan(scores.parts["form"]).tolist() == [True, False]
    assert (metrics["reward/form"], metrics["reward/right"]) == (1, 0)
    with MixedScorer({"plain": REWARDS["found"], "summed": sum_of()}) as scorer:
        metrics = judge(scorer, answers[:1], Group(None, 0, 1), print).metrics
    assert "reward" in metrics
    assert "reward/form" not in metrics


@pytest.mark.parametrize(
    ("mode", "reward", "keep"), [("keep", 2, True), ("mask", 2, False), ("penalise", -1, True)]
)
def test_a_cut_answer_is_handled_once_for_the_whole_sum(mode: str, reward: float, keep: bool) -> None:
    with MixedScorer({"": sum_of(overlong={"mode": mode, "reward": -1.0})}) as scorer:
        scores = scorer.score([of("", "12", finish="length")])
    assert (scores.reward.tolist(), scores.keep.tolist()) == ([reward], [keep])
    assert scores.success.tolist() == [0 if mode == "penalise" else 1]


def test_a_part_that_fails_costs_its_own_share() -> None:
    parts = {"right": {"name": "exact"}, "bad": {"name": PLUGINS + ":Obeys", "timeout_s": 0.5, "weight": 3.0}}
    config = RewardConfig.model_validate({"name": "sum", "parts": parts})
    with MixedScorer({"": config}, workers=1) as scorer:
        scores = scorer.score([of("", "raise", answer="raise"), of("", "hang", answer="hang"), of("", "12")])
    assert scores.reward.tolist() == [1, 1, 4]
    assert (scores.errors, scores.timeouts) == (1, 1)


def test_defaults_and_what_a_part_takes_over_from_the_sum() -> None:
    config = resolve(sum_of(timeout_s=3.0))
    right, form = terms(config)
    assert (right.succeeds, form.succeeds, config.fields["success"]) == (True, False, "right")
    assert right.config.fields == {"strip": True, "ignore_case": False}
    assert (right.config.timeout_s, right.config.reasoning, form.config.reasoning) == (3.0, "drop", "keep")
    assert resolve(config) == config
    assert terms(REWARDS["found"])[0].config is REWARDS["found"]


def test_every_part_looks_at_the_record_of_a_prompt() -> None:
    judges = Judges(sum_of())
    assert judges.problem(of("", "", answer="12").prompt) is None
    assert "is blank: an empty text would earn" in str(judges.problem(of("", "", answer=" ").prompt))
    assert "nothing is left of the answer" in str(judges.problem(of("", "", answer="x").prompt))


class Weighs(Reward):
    """Has a field that a part of a sum has too."""

    weight: float = 1.0

    def __call__(self, text: str, prompt: Prompt) -> float:
        return self.weight


BAD = [
    ({"parts": {}}, "reward.parts: got {}, expected a mapping"),
    ({}, "reward.parts: missing"),
    ({"parts": {"a": {"name": "exact", "weight": 0}}}, "reward.parts: every weight is 0"),
    ({"parts": {"a": {"name": "exact"}}, "success": "b"}, "reward.success: no part 'b'; known: a"),
    ({"parts": {"a": {"name": "exat"}}}, "reward.parts.a.name: unknown method 'exat'; did you mean 'exact'?"),
    (
        {"parts": {"a": {"name": "exact", "stirp": True}}},
        "reward.parts.a.stirp: unknown key; did you mean 'strip'?",
    ),
    ({"parts": {"a": {"name": "exact", "weight": "x"}}}, "reward.parts.a.weight: got 'x', expected a number"),
    ({"parts": {"a/b": {"name": "exact"}}}, "reward.parts.a/b: got 'a/b', expected a name for metrics"),
    ({"parts": {"a": {"name": "sum"}}}, "reward.parts.a.name: a part is no sum itself"),
    ({"parts": {"a": {"name": f"{__name__}:Weighs"}}}, "declares the field weight, which every part has"),
]


@pytest.mark.parametrize(("fields", "said"), BAD)
def test_a_sum_that_makes_no_sense_is_refused_by_key(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(RewardConfig.model_validate({"name": "sum"} | fields))
    assert said in str(caught.value)
