"""An experiment on this machine."""

import signal
import sys
from pathlib import Path

from tests.e2e.workplace import Workplace, finish, succeed, untimed, wait_until
from tests.nemo.conftest import Launcher

RANKS = ("--nodes", "1", "--gpus", "0", "--tasks", "2", "--python", sys.executable)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_its_end(
    launcher: Launcher, finished: Workplace
) -> None:
    command = ("local", "tiny.yaml", "name=stopped here", "launch.threads=1", *RANKS)
    folder = finished.run("stopped here")
    with finished.held():
        first = launcher.start(*command)
        wait_until(lambda: (folder / "heartbeat").exists(), first)
        first.send_signal(signal.SIGTERM)
    succeed(finish(first))
    assert (folder / "stopped").exists()
    assert len(finished.metrics("stopped here")) < 5
    said = succeed(finish(launcher.start(*command))).out
    assert "step 4/4 | success" in said
    assert untimed(finished.metrics("stopped here")) == untimed(finished.metrics("finished"))
    assert (folder / "summary.json").exists()


def test_a_run_that_fails_fails_the_command(launcher: Launcher, tmp_path: Path) -> None:
    done = finish(launcher.start("local", "tiny.yaml", "data.files=[nowhere.jsonl]", "name=lost", *RANKS))
    assert done.code == 1
    assert "nowhere.jsonl" in done.out
