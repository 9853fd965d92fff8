"""Answers of a batch from several sources, each judged by the reward of its source."""

from dataclasses import replace

import pytest

from megatron_troll.config import ConfigError, Overlong, RewardConfig
from megatron_troll.parallel.groups import Group
from megatron_troll.rewards.batch import judge
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.types import Rollout
from tests.unit.rewards.test_score import PLUGINS, rollout

REWARDS = {
    "exact": RewardConfig(name="exact", overlong=Overlong(mode="mask")),
    "found": RewardConfig(name="regex", pattern="12"),
    "raises": RewardConfig(name=PLUGINS + ":Obeys"),
}


def of(source: str, text: str, **fields: str) -> Rollout:
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
