"""Batches of rollouts: overlong answers, and verifiers that hang, die, raise or return nonsense."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from megatron_troll.config import Overlong, RewardConfig
from megatron_troll.parallel.groups import Group
from megatron_troll.rewards.batch import extract, judge
from megatron_troll.rewards.pool import RewardError
from megatron_troll.rewards.score import Scorer
from megatron_troll.types import Prompt, Rollout

PLUGINS = "tests.unit.rewards.plugin_rewards"


def rollout(
    text: str, answer: str = "12", finish="stop", sample: int = 0, opens_reasoning=False, **record
) -> Rollout:
    empty = np.zeros(0, dtype=np.int32)
    prompt = Prompt("p1", (), answer, record, opens_reasoning=opens_reasoning)
    return Rollout(prompt, 0, sample, empty, empty, empty, empty, 0, None, text, finish, 1.0)


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


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise", "RuntimeError: the verifier has a bug"),
        ("recurse", "RecursionError: maximum recursion depth exceeded"),
        ("no memory", "MemoryError: "),
        ("leave", "SystemExit: 3"),
        ("file", "FileNotFoundError: [Errno 2] No such file"),
        ("nan", "ValueError: the reward is nan, expected a finite float"),
        ("int", "ValueError: the reward is 1, expected a finite float"),
        ("none", "ValueError: the reward is None, expected a finite float"),
        ("lock", "ValueError: the reward is <unlocked"),
    ],
)
@pytest.mark.parametrize("plugin", ["Obeys", "ObeysHere"])
def test_an_answer_on_which_the_verifier_raises_earns_nothing_and_is_counted(text, said, plugin):
    """In a worker process and, for a cheap verifier, in this one."""
    scores = score(["a", text, "b"], name=f"{PLUGINS}:{plugin}")
    assert scores.reward.tolist() == [1, 0, 1]
    assert scores.errors == 1
    assert scores.first_error.startswith(f"reward '{PLUGINS}:{plugin}' failed on p1#1: {said}")


@pytest.mark.parametrize("plugin", ["Obeys", "ObeysHere"])
def test_a_machine_that_fails_costs_no_answer_its_reward_but_ends_the_batch(plugin):
    with Scorer(RewardConfig(name=f"{PLUGINS}:{plugin}"), workers=1) as scorer:
        with pytest.raises(RewardError, match=rf"reward '{PLUGINS}:{plugin}' failed on p1#1:\nno space left"):
            scorer.score([rollout(text, sample=index) for index, text in enumerate(["a", "machine", "b"])])
        assert scorer.score([rollout("a")]).reward.tolist() == [1]


def test_a_verifier_that_exits_is_tried_twice_then_counted():
    scores = score(["a", "end", "b"])
    assert scores.reward.tolist() == [1, 0, 1]
    assert scores.crashes == 1


def test_errors_of_a_batch_are_counted_and_said_once():
    rollouts = [rollout(text, sample=index) for index, text in enumerate(["raise", "a", "raise"])]
    said: list[str] = []
    with Scorer(RewardConfig(name=PLUGINS + ":Obeys")) as scorer:
        batch = judge(scorer, rollouts, Group(None, 0, 1), said.append)
    assert batch.metrics["reward_errors"] == 2
    assert len(said) == 1
    assert "failed on p1#0: RuntimeError: the verifier has a bug" in said[0]
    assert said[0].endswith("2 of 3 answers failed and count as wrong")


@dataclass(frozen=True)
class Threads(Group):
    """A group of two ranks that are threads of this process."""

    gathered: list[Any] = field(default_factory=lambda: [None, None])
    barrier_of: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))

    def all_gather_objects(self, value: Any) -> list[Any]:
        self.gathered[self.rank] = value
        self.barrier_of.wait()
        values = list(self.gathered)
        self.barrier_of.wait()
        return values


@dataclass
class Broken:
    """A scorer whose verifier cannot be built on rank `on`."""

    on: int
    rank: int

    def score(self, rollouts: Any) -> Any:
        if self.rank == self.on:
            raise RewardError("reward 'code' failed while it was built")
        with Scorer(RewardConfig(name="exact")) as scorer:
            return scorer.score(rollouts)

    votes = score


@pytest.mark.parametrize("act", [judge, extract])
@pytest.mark.parametrize("broken", [0, 1])
def test_an_error_of_one_rank_ends_the_scoring_on_all(act, broken):
    first = Threads(None, 0, 2)
    ranks = [first, Threads(None, 1, 2, None, first.gathered, first.barrier_of)]
    with ThreadPoolExecutor(2) as threads:
        waiting = [
            threads.submit(act, Broken(broken, rank.rank), [rollout("12")] * 4, rank, print) for rank in ranks
        ]
        errors = [one.exception() for one in waiting]
    assert [type(error) for error in errors] == [RewardError, RewardError]


CLOSED = "<think>\nfirst guess 8\n</think>\n\n12"
THOUGHTS = [
    (CLOSED, False, 1.0),
    ("<think>\nit is 12\n</think>\nI do not know.", False, 0.0),
    ("<think>12", False, None),
    ("12", False, 1.0),
    ("12", True, None),
    ("so it is 13\n</think>12", True, 1.0),
    ("a</think>b</think>12", True, 1.0),
    (f"{CLOSED}<think>", False, None),
]


@pytest.mark.parametrize(
    ("name", "options"), [("exact", {}), ("math_verify", {}), ("regex", {"pattern": "12$"})]
)
def test_what_comes_after_the_reasoning_decides(name, options):
    rollouts = [
        rollout(text, opens_reasoning=opened, sample=i) for i, (text, opened, _) in enumerate(THOUGHTS)
    ]
    with Scorer(RewardConfig(name=name, timeout_s=60.0, **options)) as scorer:
        scores, votes = scorer.score(rollouts), scorer.votes(rollouts).votes
    assert scores.reward.tolist() == [right or 0.0 for _, _, right in THOUGHTS]
    assert scores.unclosed == 3
    assert [vote == "12" for vote in votes] == [right == 1.0 for _, _, right in THOUGHTS]


def test_unclosed_reasoning_is_not_shown_to_the_verifier():
    """A verifier that likes short texts would reward the empty one."""
    with Scorer(RewardConfig(name=PLUGINS + ":Length")) as scorer:
        assert scorer.score([rollout("<think>ab")]).reward.tolist() == [0.0]


def test_reasoning_can_be_kept():
    with Scorer(RewardConfig(name="regex", pattern="12", reasoning="keep")) as scorer:
        scores = scorer.score([rollout("<think>12"), rollout("<think>12</think>")])
    assert scores.reward.tolist() == [1, 1]
    assert scores.unclosed == 0


def test_no_rollouts_no_rewards():
    assert score([]).reward.shape == (0,)


@pytest.mark.parametrize("name", ["exact", "math_verify"])
def test_what_the_verifier_saw_votes(name):
    cut = [rollout("12"), rollout("13", finish="length"), rollout("", finish="abort"), rollout(" 12")]
    for mode, expected in (("keep", ["12", "13", None, "12"]), ("penalise", ["12", None, None, "12"])):
        with Scorer(RewardConfig(name=name, overlong=Overlong(mode=mode))) as scorer:
            assert scorer.has_votes
            assert scorer.votes(cut).votes == expected


def test_a_vote_that_hangs_is_none_and_the_others_count():
    config = RewardConfig(name="regex", pattern="(a+)+$", timeout_s=0.5)
    with Scorer(config) as scorer:
        assert scorer.votes([rollout("a" * 40 + "!"), rollout("aa")]).votes == [None, "aa"]


def test_a_vote_must_be_text():
    with Scorer(RewardConfig(name=PLUGINS + ":VotesANumber")) as scorer:
        found = scorer.votes([rollout(""), rollout("ab", sample=1)])
    assert found.votes == [None, None]
    assert found.errors == 1
    assert "failed on p1#1: TypeError: the vote is 2, expected text" in found.first_error
    with Scorer(RewardConfig(name=PLUGINS + ":Length")) as scorer:
        assert not scorer.has_votes
