"""When things are due, and the control experiment's shuffling."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_troll.loop import alarm, due, shuffled


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
