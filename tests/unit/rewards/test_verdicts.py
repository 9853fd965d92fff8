"""Verdicts of math_verify on the answers of verdicts/, whose right verdict is known (verdicts/README.md)."""

import pytest

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.reward import build
from tools.verdicts import PAIRS, judged, read

VERIFIER = build(RewardConfig(name="math_verify"))
ALL = [pair for file in ("pairs.jsonl", "reported.jsonl") for pair in read(PAIRS / file)]


@pytest.mark.parametrize("style", sorted({pair.style for pair in ALL}))
def test_answers_that_the_notation_was_written_for(style):
    pairs = [pair for pair in ALL if pair.style == style and pair.half == "seen"]
    assert [one.pair for one in judged(pairs, VERIFIER) if one.mistake] == []


def test_answers_that_it_was_not_written_for():
    mistakes = [one.mistake for one in judged([pair for pair in ALL if pair.half == "unseen"], VERIFIER)]
    assert mistakes.count("false accept") <= 1
    assert mistakes.count("false reject") <= 3
