"""A run that is stopped, killed and continued ends as if nothing had happened."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.exported import largest_gap
from tests.e2e.workplace import Workplace, finish, succeed, untimed, wait_until


def test_a_run_survives_ctrl_c_a_second_writer_and_a_killed_rank(finished: Workplace) -> None:
    """Rerun from the folder of a finished run, under another name: all metrics are the same numbers, and the
    exported model is the one that drew the rollouts of the step after."""
    first = finished.start("train", "runs/finished", "name=again")
    wait_until(lambda: finished.metrics("again"), first)
    second = finished.mtroll("train", "runs/finished", "name=again", "resume=true")
    assert second.code == 2
    assert len(second.err) == 1
    assert "runs/again is being written by pid" in second.err[0]
    first.send_signal(signal.SIGINT)
    assert "continue with resume=true" in succeed(finish(first)).out
    stopped = len(finished.metrics("again"))
    assert stopped < 5

    resumed = finished.start("train", "runs/again", "resume=true", "train.steps=5")
    wait_until(lambda: len(finished.metrics("again")) > stopped, resumed)
    os.kill(_pid_of_rank(finished, "again", 1), signal.SIGKILL)
    killed = finish(resumed)
    assert killed.code != 0
    assert killed.err[-1].startswith("rank 1 failed (killed by SIGKILL")

    succeed(finished.mtroll("train", "runs/again", "resume=true", "train.steps=5"))
    assert untimed(finished.metrics("again"))[:5] == untimed(finished.metrics("finished"))
    assert [row["step"] for row in finished.metrics("again")] == [0, 1, 2, 3, 4, 5]
    drawn = finished.run("again") / "rollouts" / "step_000005.0-of-1.jsonl.gz"
    assert largest_gap(finished.run("finished") / "hf", drawn) < 1e-4


@pytest.fixture(scope="module")
def stopped(warm: Workplace) -> Workplace:
    """A run that was told to stop by SIGTERM early on."""
    running = warm.start("train", "tiny.yaml", "name=stopped")
    wait_until(lambda: warm.metrics("stopped"), running)
    running.send_signal(signal.SIGTERM)
    succeed(finish(running))
    return warm


@pytest.mark.parametrize(
    "layout",
    [["models.policy.layout={tp: 1, ep: 1, pp: 2}"], ["models.policy.layout={tp: 1, ep: 1}", "launch.ranks=1"]],
    ids=["pp2", "one rank"],
)
def test_a_run_continues_on_another_layout(stopped: Workplace, finished: Workplace, layout: list[str]) -> None:
    """Tokens are drawn by keys, so the step after draws the same rollouts, and learns the same from them."""
    name = f"on-{len(layout)}"
    shutil.copytree(stopped.run("stopped"), stopped.run(name))
    step = len(stopped.metrics("stopped"))
    arguments = ["train", f"runs/{name}", f"name={name}", "resume=true", f"train.steps={step}", *layout]
    succeed(stopped.mtroll(*arguments))
    here, there = stopped.metrics(name)[step], finished.metrics("finished")[step]
    for figure in ("loss", "grad_norm", "entropy", "kl_before", "success"):
        assert here[figure] == pytest.approx(there[figure], rel=1e-5, abs=1e-9), figure


def _pid_of_rank(place: Workplace, name: str, rank: int) -> int:
    return _json(place.run(name) / "heartbeat" / f"rank_{rank}.json")["pid"]


def _json(path: Path) -> Any:
    import json

    return json.loads(path.read_text())
