"""Which batch a step trains on, and that nothing sampled is lost or used twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.rewards.batch import ScoredBatch
from megatron_troll.rollout.engine import EngineError
from megatron_troll.run.queue import BatchFuture, RolloutBatch, RolloutQueue
from tests.unit.rollout.test_archive import PROMPTS, assert_arrays, assert_same, rollout


def collected(number: int) -> RolloutBatch:
    """Batch `number`, known by its timeouts; of three responses the first is not trained on."""
    drawn = [rollout("a", 0, 5), rollout("a", 1, 2), rollout("b", 1, number)]
    reward = np.array([0.0, 0.1, 1.0], dtype=np.float32)
    success = np.array([0.0, 0.5, 1.0], dtype=np.float32)
    parts = {"form": np.array([1.0, np.nan, 0.25], dtype=np.float32)}
    kept = np.array([False, True, True])
    trained_on = [replace(one, group=i) for i, one in enumerate(drawn[1:])]
    return RolloutBatch(
        ScoredBatch(drawn, reward, success, timeouts=number, crashes=1, parts=parts),
        kept,
        trained_on,
        rounds=2,
    )


# Prompts of a batch.
POSITIONS = 2


def train(pending: RolloutQueue, steps: range, sampled: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(batch, its staleness) of each step; `sampled` gains (step, batch)."""
    trained = []
    for step in steps:

        def begin(number: int, step: int = step) -> BatchFuture:
            sampled.append((step, number))
            return drawn(number, step)

        waiting = pending.next(step, begin)
        trained.append((waiting.wait().sampled.timeouts, step - 1 - waiting.trained))
    return trained


def drawn(number: int, step: int) -> BatchFuture:
    batch = collected(number)
    return BatchFuture(step - 1, POSITIONS * number, lambda: batch, batch)


@pytest.mark.parametrize(
    ("staleness", "stale"), [(0, [0, 0, 0, 0, 0]), (2, [0, 1, 2, 2, 2]), (9, [0, 1, 2, 3, 4])]
)
def test_each_batch_is_trained_on_once_in_order_and_so_many_steps_late(
    staleness: int, stale: list[int]
) -> None:
    sampled: list[tuple[int, int]] = []
    trained = train(RolloutQueue(staleness, last=5), range(1, 6), sampled)
    assert trained == list(zip(range(1, 6), stale))
    assert [number for _, number in sampled] == [1, 2, 3, 4, 5]


def test_the_first_batches_are_sampled_at_once_and_then_one_a_step() -> None:
    sampled: list[tuple[int, int]] = []
    train(RolloutQueue(2, last=6), range(1, 7), sampled)
    assert sampled == [(1, 1), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6)]


def test_a_resumed_queue_is_that_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole: list[tuple[int, int]] = []
    expected = train(RolloutQueue(2, last=8), range(1, 9), whole)
    before, after, sampled = RolloutQueue(2, last=8), RolloutQueue(2, last=8), []
    trained = train(before, range(1, 5), sampled)
    before.write(tmp_path)
    after.read(tmp_path, PROMPTS)
    for kept, read in zip(before.batches, after.batches, strict=True):
        one, other = kept.wait(), read.wait()
        assert_arrays(one.sampled.reward, other.sampled.reward)
        assert_arrays(one.sampled.success, other.sampled.success)
        assert_arrays(one.sampled.parts["form"], other.sampled.parts["form"])
        assert_arrays(one.kept, other.kept)
        assert one.metrics == other.metrics
        for here, there in ((one.sampled.rollouts, other.sampled.rollouts), (one.rollouts, other.rollouts)):
            for pair in zip(here, there, strict=True):
                assert_same(*pair)
    assert trained + train(after, range(5, 9), sampled) == expected
    assert sampled == whole


def test_a_checkpoint_without_waiting_batches_empties_the_queue(tmp_path: Path) -> None:
    pending = RolloutQueue(1, last=4)
    train(pending, range(1, 2), [])
    pending.read(tmp_path, PROMPTS)
    assert not pending.batches


def test_what_is_under_way_is_begun_anew_and_nothing_is_trained_on_twice(tmp_path: Path) -> None:
    """Batch 3 is there, 4 and 5 are not: a run that continues after step 2 begins with the prompts of batch
    4."""
    before, after, sampled = RolloutQueue(3, last=6), RolloutQueue(3, last=6), []
    train(before, range(1, 3), sampled)
    there, *under_way = before.batches
    for waiting in under_way:
        waiting.batch = None
    assert before.position(now=POSITIONS * 6) == POSITIONS * 4
    before.write(tmp_path)
    after.read(tmp_path, PROMPTS)
    assert [waiting.wait().sampled.timeouts for waiting in after.batches] == [there.wait().sampled.timeouts]
    assert after.position(now=POSITIONS * 4) == POSITIONS * 4
    resumed: list[tuple[int, int]] = []
    assert [batch for batch, _ in train(after, range(3, 7), resumed)] == [3, 4, 5, 6]
    assert resumed == [(3, 4), (3, 5), (3, 6)]


def test_a_batch_that_fails_stays_in_the_queue() -> None:
    def failing(number: int) -> BatchFuture:
        def finish() -> RolloutBatch:
            raise EngineError("no servers")

        return BatchFuture(0, POSITIONS * number, finish)

    pending = RolloutQueue(1, last=4)
    with pytest.raises(EngineError):
        pending.next(1, failing)
    assert len(pending.batches) == 2
    assert pending.position(now=POSITIONS * 3) == POSITIONS


@pytest.mark.parametrize("name", ["pending_000.batch.json", "pending_000.json", "pending_000.npz"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b"\xff\xfe", b"PK\x03\x04", b"[" * 100_000])
def test_a_damaged_batch_is_refused_by_its_name(name: str, damage: bytes, tmp_path: Path) -> None:
    before = RolloutQueue(2, last=8)
    train(before, range(1, 5), [])
    before.write(tmp_path)
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"pending_000\.batch\.json or \.json or \.npz of pending_000"):
        RolloutQueue(2, last=8).read(tmp_path, PROMPTS)


@pytest.mark.parametrize("key", ["reward", "success", "kept", "groups"])
def test_a_batch_with_fewer_figures_than_rollouts_is_refused(key: str, tmp_path: Path) -> None:
    before = RolloutQueue(2, last=8)
    train(before, range(1, 5), [])
    before.write(tmp_path)
    file = tmp_path / "pending_000.batch.json"
    rest = json.loads(file.read_text())
    file.write_text(json.dumps(rest | {key: rest[key][:-1]}))
    with pytest.raises(CheckpointError, match="the checkpoint is damaged"):
        RolloutQueue(2, last=8).read(tmp_path, PROMPTS)
