"""DAPO's soft overlong punishment, by numbers worked out by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_troll.config import ConfigError, RewardConfig
from megatron_troll.config.load import load
from megatron_troll.parallel.groups import Group
from megatron_troll.rewards.batch import judge
from megatron_troll.rewards.length import LengthPenalty, length_penalty
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.rewards.terms import terms
from megatron_troll.task import prepare
from megatron_troll.types import Rollout
from tests.unit.demo_task import write_config
from tests.unit.rewards.test_mixed import of, sum_of

CONFIG = """
name: trial
models: {{policy: {{path: {base}, init: random, layout: {{tp: 2, ep: 2}}}}}}
data: {{files: [{prompts}], held_out: 1, max_prompt_tokens: 32}}
rollout: {{prompts: 4, sampling: {{max_tokens: 8}}}}
"""


def config(soft: dict[str, Any] | None, name: str = "exact", **overlong: Any) -> RewardConfig:
    return RewardConfig.model_validate({"name": name, "overlong": {"soft": soft, **overlong}})


def long(length: int, source: str = "", text: str = "12", **fields: Any) -> Rollout:
    """An answer of that many tokens."""
    return replace(of(source, text, **fields), response_ids=np.zeros(length, dtype=np.int32))


@pytest.mark.parametrize(
    ("length", "penalty"),
    [
        (1, 0),
        (16_384, 0),
        (16_385, -1 / 4096),
        (18_432, -0.5),
        (20_479, -4095 / 4096),
        (20_480, -1),
        (30_000, -1),
    ],
)
def test_the_line_of_the_paper(length: int, penalty: float) -> None:
    """L_max 20,480 and L_cache 4,096."""
    assert LengthPenalty(20_480, 4096, 1.0).of(length) == penalty


def test_it_is_added_to_a_verifier_and_logged_beside_it() -> None:
    answers = [long(6), long(8), long(10), long(8, text="13")]
    with MixedScorer({"": config({"cache": 4})}, limit=10) as scorer:
        judged = judge(scorer, answers, Group(None, 0, 1), print)
    assert judged.reward.tolist() == [1, 0.5, 0, -0.5]
    assert judged.success.tolist() == [1, 1, 1, 0]
    expected = {"success": 0.75, "reward": 0.25, "reward/overlong": -0.5}
    assert {name: judged.metrics[name] for name in expected} == expected


def test_it_is_added_to_a_sum_once_with_its_own_weight_and_end() -> None:
    summed = sum_of(overlong={"soft": {"cache": 2, "longest": 6, "weight": 4.0}})
    with MixedScorer({"a": summed, "b": config(None)}, limit=10) as scorer:
        scores = scorer.score([long(5, "a", "2", answer="2"), long(9, "b")])
    assert scores.reward.tolist() == [2.0 - 4 * 0.5, 1.0]
    assert scores.parts["overlong"][0] == -0.5
    assert np.isnan(scores.parts["overlong"][1])
    assert scores.parts["right"][0] == 1


def test_evaluations_have_none() -> None:
    with MixedScorer({"": config({"cache": 4})}) as scorer:
        scores = scorer.score([long(100)])
    assert (scores.reward.tolist(), scores.parts) == ([1], {})


def test_an_answer_that_is_masked_has_it_too() -> None:
    with MixedScorer({"": config({"cache": 4}, mode="mask")}, limit=10) as scorer:
        scores = scorer.score([long(10, finish="length")])
    assert (scores.reward.tolist(), scores.keep.tolist()) == ([0], [False])


def test_what_makes_no_sense_is_refused(base: Path, tmp_path: Path) -> None:
    run = write_config(CONFIG, base, tmp_path)
    prepare(load(run, ["reward.overlong={soft: {cache: 8}}"]))
    with pytest.raises(ConfigError, match=r"soft\.cache=9 is more than rollout\.sampling\.max_tokens=8"):
        prepare(load(run, ["reward.overlong={soft: {cache: 9}}"]))
    with pytest.raises(ConfigError, match=r"data\.x.*cache=9 is more than longest=8"):
        length_penalty(config({"cache": 9, "longest": 8}), 10, "data.x")
    with pytest.raises(ValueError, match="two penalties for one answer"):
        config({"cache": 4}, mode="penalise")
    named = {"name": "sum", "parts": {"overlong": {"name": "exact"}}, "overlong": {"soft": {"cache": 4}}}
    with pytest.raises(ConfigError, match=r"reward\.parts\.overlong: .* choose another"):
        terms(RewardConfig.model_validate(named))
