"""When things are due, and the control experiment's shuffling."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_troll.loop import alarm, due, evaluate, rescued, shuffled
from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.rewards.pool import RewardError
from megatron_troll.rollout.engine import EngineError
from megatron_troll.run.run import TrainState


@pytest.mark.parametrize(("every", "steps"), [(0, [7]), (1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (9, [7])])
def test_due_at_every_nth_step_and_at_the_last(every: int, steps: list[int]) -> None:
    assert [step for step in range(1, 8) if due(step, every, last=7)] == steps


@pytest.mark.parametrize(("outside", "alarmed"), [(0.009, False), (0.02, True), (None, False)])
def test_mass_outside_the_support_raises_an_alarm(outside: float | None, alarmed: bool) -> None:
    said: list[str] = []
    run: Any = SimpleNamespace(session=SimpleNamespace(progress=SimpleNamespace(say=said.append)))
    alarm(run, 7, {} if outside is None else {"outside_mass": outside})
    assert [line.split(";")[0] for line in said] == (
        ["step 7: 0.020 of the probability has left the old policy's support"] if alarmed else []
    )


def test_shuffled_rewards_are_the_same_rewards_elsewhere() -> None:
    rewards = np.arange(64, dtype=np.float32)
    moved = shuffled(rewards, step=1)
    assert sorted(moved) == sorted(rewards)
    assert (moved != rewards).mean() > 0.5
    assert (moved == shuffled(rewards, step=1)).all()
    assert (moved != shuffled(rewards, step=2)).any()


class Recorder:
    """A run of which only its saves are looked at."""

    def __init__(self, failing: Exception | None = None) -> None:
        self.saved: list[int] = []
        self.said: list[str] = []
        self.failing = failing
        self.checkpoints = SimpleNamespace(finish=lambda: None)
        self.session = SimpleNamespace(progress=SimpleNamespace(say=self.said.append))

    def save(self, state: TrainState) -> None:
        if self.failing is not None:
            raise self.failing
        self.saved.append(state.step)

    def usable(self) -> str:
        return "the newest whole checkpoint is step_000002"


FAILURES = [EngineError("no server"), RewardError("no worker"), OSError(28, "No space left on device")]


@pytest.mark.parametrize("error", FAILURES)
def test_what_was_learnt_is_saved_before_an_error_ends_the_run(error: Exception) -> None:
    run: Any = Recorder()
    with pytest.raises(type(error), match=str(error).replace("[", r"\[")), rescued(run, TrainState(step=3)):
        raise error
    assert run.saved == [3]
    assert run.said == ["step 3 is saved: continue with resume=true"]


@pytest.mark.parametrize("error", FAILURES)
def test_an_evaluation_that_fails_is_told_after_its_row(error: Exception) -> None:
    def fail() -> float:
        raise error

    run: Any = SimpleNamespace(sync=lambda step: {"sync_s": 1.0}, evaluator=SimpleNamespace(success=fail))
    metrics: dict[str, float] = {}
    assert evaluate(run, 3, metrics) is error
    assert metrics == {"sync_s": 1.0}


def test_before_the_first_step_there_is_nothing_to_save() -> None:
    run: Any = Recorder()
    with pytest.raises(EngineError), rescued(run, TrainState()):
        raise EngineError("no server")
    assert run.saved == []


def test_where_saving_fails_too_both_errors_are_told() -> None:
    run: Any = Recorder(failing=CheckpointError("the writer failed"))
    both = pytest.raises(
        CheckpointError, match=r"(?s)No space left.*writer failed.*newest whole checkpoint is step_000002"
    )
    with both, rescued(run, TrainState(step=3)):
        raise OSError(28, "No space left on device")
