"""A run that is stopped, killed and continued ends as if nothing had happened."""

import json
import os
import shutil
import signal

import pytest

from tests.e2e.exported import largest_gap
from tests.e2e.workplace import Workplace, finish, succeed, untimed, wait_until


def test_ctrl_c_a_second_writer_and_a_killed_rank_change_nothing(finished: Workplace) -> None:
    """A rerun from the folder of a finished run gives the same numbers, whatever happens on the way, and the
    exported model is the one that draws the rollouts of the next step."""
    with finished.held():
        first = finished.start("train", "runs/finished", "name=again")
        wait_until(lambda: (finished.run("again") / "heartbeat").exists(), first)
        second = finished.mtroll("train", "runs/finished", "name=again", "resume=true")
        first.send_signal(signal.SIGINT)
    assert second.code == 2
    assert len(second.err) == 1
    assert "runs/again is being written by pid" in second.err[0]
    assert "continue with resume=true" in succeed(finish(first)).out
    assert [row["step"] for row in finished.metrics("again")] == [0]

    resumed = finished.start("train", "runs/again", "resume=true")
    wait_until(lambda: len(finished.metrics("again")) > 2, resumed)
    with finished.held():
        os.kill(_pid_of_rank(finished, "again", 1), signal.SIGKILL)
        killed = finish(resumed)
    assert killed.code != 0
    assert killed.err[-1].startswith("rank 1 failed (killed by SIGKILL")

    succeed(finished.mtroll("train", "runs/again", "resume=true", "train.steps=5"))
    rows = finished.metrics("again")
    assert untimed(rows)[:5] == untimed(finished.metrics("finished"))
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    drawn = finished.run("again") / "rollouts" / "step_000005.0-of-1.jsonl.gz"
    assert largest_gap(finished.run("finished") / "hf", drawn) < 1e-4


@pytest.fixture(scope="module")
def stopped(warm: Workplace) -> Workplace:
    """A run that was told to stop by SIGTERM after a step or two."""
    running = warm.start("train", "tiny.yaml", "name=stopped")
    wait_until(lambda: len(warm.metrics("stopped")) > 1, running)
    with warm.held():
        running.send_signal(signal.SIGTERM)
    succeed(finish(running))
    return warm


@pytest.mark.parametrize(
    ("name", "layout"),
    [("on-two-stages", "{tp: 1, ep: 1, pp: 2}"), ("on-one-rank", "{tp: 1, ep: 1}")],
)
def test_a_run_continues_on_another_layout(
    stopped: Workplace, finished: Workplace, name: str, layout: str
) -> None:
    """Tokens are drawn by keys: the next step draws the same rollouts on any layout, and learns the same."""
    step = len(stopped.metrics("stopped"))
    shutil.copytree(stopped.run("stopped"), stopped.run(name))
    changes = [f"name={name}", f"train.steps={step}", f"models.policy.layout={layout}", "launch.ranks=null"]
    succeed(stopped.mtroll("train", f"runs/{name}", "resume=true", *changes))
    here, there = stopped.metrics(name)[step], finished.metrics("finished")[step]
    for figure in ("grad_norm", "entropy", "kl_before", "success"):
        assert here[figure] == pytest.approx(there[figure], rel=1e-5), figure
    # A mean of terms that nearly cancel.
    assert here["loss"] == pytest.approx(there["loss"], abs=1e-6)


def _pid_of_rank(place: Workplace, name: str, rank: int) -> int:
    return json.loads((place.run(name) / "heartbeat" / f"rank_{rank}.json").read_text())["pid"]
