"""Batches of rollouts: overlong answers, and verifiers that hang, die, raise or return nonsense."""

import os
import signal
import time

import numpy as np
import pytest

from megatron_troll.config import Overlong, RewardConfig
from megatron_troll.rewards.pool import RewardError
from megatron_troll.rewards.score import Scorer
from megatron_troll.types import Prompt, Rollout

PLUGINS = "tests.unit.rewards.plugin_rewards"


def rollout(text: str, answer: str = "12", finish="stop", sample: int = 0, **record) -> Rollout:
    empty = np.zeros(0)
    prompt = Prompt("p1", (), answer, record)
    return Rollout(prompt, 0, sample, empty, empty, empty, empty, empty, None, text, finish, empty, 1.0)


def score(texts, name=PLUGINS + ":Obeys", workers=2, **config):
    rollouts = [rollout(text, sample=index) for index, text in enumerate(texts)]
    with Scorer(RewardConfig(name=name, **config), workers) as scorer:
        return scorer.score(rollouts)


CUT = [rollout("12"), rollout("12", finish="length"), rollout("13", finish="length"), rollout("13")]


@pytest.mark.parametrize(
    ("overlong", "reward", "keep"),
    [
        (Overlong(mode="keep"), [1, 1, 0, 0], [True, True, True, True]),
        (Overlong(mode="mask"), [1, 1, 0, 0], [True, False, False, True]),
        (Overlong(mode="penalise", reward=-0.5), [1, -0.5, -0.5, 0], [True, True, True, True]),
    ],
)
def test_answers_cut_at_the_length_limit(overlong, reward, keep):
    with Scorer(RewardConfig(name="exact", overlong=overlong)) as scorer:
        scores = scorer.score(CUT)
    assert scores.reward.tolist() == reward
    assert scores.keep.tolist() == keep
    assert scores.reward.dtype == np.float32


def test_aborted_answers_are_taken_out_unseen():
    with Scorer(RewardConfig(name="exact")) as scorer:
        scores = scorer.score([rollout("12", finish="abort"), rollout("12")])
    assert scores.keep.tolist() == [False, True]
    assert scores.reward.tolist() == [0, 1]


def test_a_slow_verifier_runs_in_parallel_and_keeps_the_order():
    scores = score([r"\boxed{12}", "no", r"\boxed{24/2}", ""] * 5, name="math_verify", timeout_s=60.0)
    assert scores.reward.tolist() == [1, 0, 1, 0] * 5


def test_a_batch_is_shared_by_the_workers():
    with Scorer(RewardConfig(name=PLUGINS + ":NamesItsProcess"), workers=2) as scorer:
        processes = set(scorer.score([rollout("", sample=index) for index in range(4)]).reward)
    assert len(processes) == 2


@pytest.mark.parametrize("name", ["exact", PLUGINS + ":Obeys"])
def test_every_answer_is_progress(name: str) -> None:
    """In this process and from workers, whose starts are progress too."""
    beats: list[float] = []
    with Scorer(RewardConfig(name=name), workers=1, progress=lambda: beats.append(0.0)) as scorer:
        scorer.score([rollout("a", sample=index) for index in range(5)])
    assert len(beats) == (5 if name == "exact" else 6)


def test_a_plug_in_sees_the_record_of_the_prompt():
    with Scorer(RewardConfig(name=PLUGINS + ":Length")) as scorer:
        assert scorer.score([rollout("abcdef"), rollout("abcdef", longest=6)]).reward.tolist() == [0, 1]


def test_a_hung_verifier_gives_0_is_counted_and_leaves_the_pool_alive():
    start = time.monotonic()
    with Scorer(RewardConfig(name=PLUGINS + ":Obeys", timeout_s=0.5), workers=1) as scorer:
        first = scorer.score([rollout(text) for text in ("a", "hang", "b", "hang", "c")])
        second = scorer.score([rollout("a")])
    assert first.reward.tolist() == [1, 0, 1, 0, 1]
    assert (first.timeouts, second.timeouts) == (2, 0)
    assert second.reward.tolist() == [1]
    assert first.keep.all()
    assert time.monotonic() - start < 60


def test_a_catastrophic_pattern_is_cut_off():
    scores = score(["a" * 40 + "!", "aa"], name="regex", pattern="(a+)+$", timeout_s=0.5)
    assert (scores.timeouts, scores.crashes) == (1, 0)


def test_an_answer_that_kills_its_worker_is_tried_twice_then_counted():
    scores = score(["a", "die", "b"])
    assert scores.reward.tolist() == [1, 0, 1]
    assert (scores.crashes, scores.timeouts) == (1, 0)


def test_a_worker_that_is_killed_once_costs_nothing(tmp_path):
    scores = score(["a", f"die once {tmp_path / 'marker'}", "b"])
    assert scores.reward.tolist() == [1, 1, 1]
    assert scores.crashes == 0


def test_workers_killed_between_batches_are_replaced():
    with Scorer(RewardConfig(name=PLUGINS + ":NamesItsProcess"), workers=1) as scorer:
        before = int(scorer.score([rollout("")]).reward[0])
        os.kill(before, signal.SIGKILL)
        scores = scorer.score([rollout(""), rollout("")])
    assert before not in scores.reward
    assert scores.crashes == 0


def test_a_verifier_that_can_never_be_built_ends_the_batch():
    with pytest.raises(RewardError, match="failed while it was built: its process ended with exit code -9"):
        score(["a"], name=PLUGINS + ":DiesWhenBuilt", trainer=os.getpid())


def test_an_exception_names_the_sample_and_carries_the_traceback():
    with pytest.raises(RewardError, match=r"(?s)failed on p1#1:.*RuntimeError: the verifier has a bug"):
        score(["a", "raise"])


@pytest.mark.parametrize(("text", "value"), [("nan", "nan"), ("int", "1"), ("none", "None")])
def test_a_reward_that_is_not_a_finite_float_names_the_sample(text, value):
    with pytest.raises(RewardError, match=f"gave {value} for p1#1; expected a finite float"):
        score(["a", text])


def test_no_rollouts_no_rewards():
    assert score([]).reward.shape == (0,)


@pytest.mark.parametrize("name", ["exact", "math_verify"])
def test_what_the_verifier_saw_votes(name):
    cut = [rollout("12"), rollout("13", finish="length"), rollout("", finish="abort"), rollout(" 12")]
    for mode, expected in (("keep", ["12", "13", None, "12"]), ("penalise", ["12", None, None, "12"])):
        with Scorer(RewardConfig(name=name, overlong=Overlong(mode=mode))) as scorer:
            assert scorer.has_votes
            assert scorer.votes(cut) == expected


def test_a_vote_that_hangs_is_none_and_the_others_count():
    config = RewardConfig(name="regex", pattern="(a+)+$", timeout_s=0.5)
    with Scorer(config) as scorer:
        assert scorer.votes([rollout("a" * 40 + "!"), rollout("aa")]) == [None, "aa"]


def test_a_vote_must_be_text():
    with Scorer(RewardConfig(name=PLUGINS + ":VotesANumber")) as scorer:
        assert scorer.votes([rollout("")]) == [None]
        with pytest.raises(RewardError, match="VotesANumber' gave 2 as the vote of p1#1; expected text"):
            scorer.votes([rollout(""), rollout("ab", sample=1)])
    with Scorer(RewardConfig(name=PLUGINS + ":Length")) as scorer:
        assert not scorer.has_votes
