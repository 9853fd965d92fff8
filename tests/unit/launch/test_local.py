"""Ranks started on this machine live and end together, and a failure names its rank."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_troll.launch.local import discard_logs, launch

LAUNCHER = """
import sys
from pathlib import Path
from megatron_troll.launch.local import launch
sys.exit(launch([sys.executable, "-c", sys.argv[2]], ranks=2, threads=1, log_dir=Path(sys.argv[1])))
"""

PATIENT = """
import os, signal, time
from pathlib import Path
def stop(number, frame):
    with open(f"signals_{os.environ['RANK']}", "a") as file:
        file.write(signal.Signals(number).name + " ")
    time.sleep(0.5)
    Path(f"saved_{os.environ['RANK']}").write_text("checkpoint")
    raise SystemExit(0)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
Path(f"ready_{os.environ['RANK']}").write_text(str(os.getpid()))
while True:
    time.sleep(0.05)
"""

SLOW_TO_START = """
import os, signal, time
from pathlib import Path
Path(f"ready_{os.environ['RANK']}").write_text("imports")
end = time.monotonic() + 8
while not signal.sigpending() and time.monotonic() < end:
    time.sleep(0.01)
from megatron_troll.system import watched
with watched() as interrupts:
    assert interrupts.asked
Path(f"saved_{os.environ['RANK']}").write_text("checkpoint")
"""

STUBBORN = PATIENT.replace("raise SystemExit(0)", "")


def run(script: str, tmp_path: Path, ranks: int = 2, grace_s: float = 0.3) -> int:
    return launch([sys.executable, "-c", script], ranks, 3, tmp_path / "logs", grace_s)


def start(script: str, tmp_path: Path) -> subprocess.Popen[str]:
    """A launcher in a process of its own, once both ranks are ready for signals."""
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path / "logs"), script]
    launcher = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: all(read(tmp_path / f"ready_{rank}") for rank in (0, 1)))
    return launcher


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_until(condition, timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_ranks_get_their_place_and_only_the_first_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "OMP_NUM_THREADS")
    script = f"import os; print(*(os.environ[n] for n in {names}), int(os.environ['MASTER_PORT']) > 0)"
    assert run(script, tmp_path) == 0
    assert capfd.readouterr().out == "0 0 2 127.0.0.1 3 True\n"
    assert read(tmp_path / "logs" / "rank_1.out") == "1 1 2 127.0.0.1 3 True\n"


def test_the_first_rank_writes_to_the_terminal_itself(tmp_path: Path) -> None:
    """Not through a pipe: a pseudo-terminal given to the launcher is the rank's own stdout."""
    leader, follower = os.openpty()
    script = "import sys; print('terminal', sys.stdout.isatty())"
    command = [sys.executable, "-c", LAUNCHER, str(tmp_path), script]
    assert subprocess.run(command, stdout=follower, check=False).returncode == 0
    os.close(follower)
    assert os.read(leader, 100) == b"terminal True\r\n"
    os.close(leader)


def test_a_failing_rank_is_named_and_the_others_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = """
import os, sys, time
if os.environ["RANK"] == "1":
    raise SystemExit("no such prompt file")
time.sleep(60)
"""
    begin = time.monotonic()
    assert run(script, tmp_path) == 1
    assert time.monotonic() - begin < 10
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1] == "rank 1 failed (exit code 1): no such prompt file"
    assert lines[0] == f"The end of {tmp_path / 'logs' / 'rank_1.err'}:"


def test_the_first_failure_is_named_not_its_echo(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = f"""
import os, time
from pathlib import Path
culprit = Path({str(tmp_path / "pid")!r})
if os.environ["RANK"] == "1":
    culprit.write_text(str(os.getpid()))
    raise SystemExit("division by zero")
while not culprit.exists() or Path("/proc", culprit.read_text() or "self").exists():
    time.sleep(0.02)
time.sleep(0.2)
raise SystemExit("connection lost")
"""
    assert run(script, tmp_path, grace_s=10) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "rank 1 failed (exit code 1): division by zero"


def test_the_first_ranks_stderr_is_shown_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rank_0.err").write_text("from an earlier launch\n")
    assert run("raise SystemExit('bad layout')", tmp_path, ranks=1) == 1
    expected = "bad layout\nrank 0 failed (exit code 1): bad layout\n"
    assert capfd.readouterr().err == expected
    assert read(tmp_path / "logs" / "rank_0.err") == "from an earlier launch\nbad layout\n"


def test_a_killed_rank_is_named_with_its_signal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert run(script, tmp_path, ranks=1) == 137
    assert "rank 0 failed (killed by SIGKILL, as the kernel does" in capfd.readouterr().err


def test_a_rank_that_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    pid_file = tmp_path / "child"
    script = f"""
import os, signal, subprocess, time
from pathlib import Path
if os.environ["RANK"] == "1":
    while not Path({str(pid_file)!r}).exists():
        time.sleep(0.02)
    raise SystemExit(1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
Path({str(pid_file)!r}).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""
    assert run(script, tmp_path) == 1
    wait_until(lambda: not alive(int(pid_file.read_text())))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_handed_on_once_and_waited_for(tmp_path: Path, number: signal.Signals) -> None:
    launcher = start(PATIENT, tmp_path)
    launcher.send_signal(number)
    time.sleep(0.1)
    launcher.send_signal(number)
    _, stderr = launcher.communicate(timeout=10)
    assert launcher.returncode == 0
    assert [read(tmp_path / f"signals_{rank}") for rank in (0, 1)] == [f"{number.name} "] * 2
    assert all(read(tmp_path / f"saved_{rank}") for rank in (0, 1))
    assert stderr.startswith("Already stopping")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_waits_for_ranks_that_still_start(tmp_path: Path, number: signal.Signals) -> None:
    launcher = start(SLOW_TO_START, tmp_path)
    launcher.send_signal(number)
    _, stderr = launcher.communicate(timeout=10)
    assert (launcher.returncode, stderr) == (0, "")
    assert all(read(tmp_path / f"saved_{rank}") for rank in (0, 1))


def test_the_third_stop_kills(tmp_path: Path) -> None:
    launcher = start(STUBBORN, tmp_path)
    for _ in range(3):
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.1)
    launcher.communicate(timeout=10)
    assert launcher.returncode == 137


def test_ranks_do_not_outlive_a_killed_launcher(tmp_path: Path) -> None:
    launcher = start(PATIENT, tmp_path)
    launcher.kill()
    launcher.communicate()
    wait_until(lambda: all(read(tmp_path / f"saved_{rank}") for rank in (0, 1)))
    assert all(set(read(tmp_path / f"signals_{rank}").split()) == {"SIGTERM"} for rank in (0, 1))
    wait_until(lambda: not any(alive(int(read(tmp_path / f"ready_{rank}"))) for rank in (0, 1)))


REFUSING = """
from megatron_troll.system import last_words
import os
last_words("no such prompt file" if TWO or os.environ["RANK"] == "1" else "")
raise SystemExit(2 if TWO or os.environ["RANK"] == "1" else 0)
"""


@pytest.mark.parametrize("both", [True, False])
def test_a_refusal_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str], both: bool) -> None:
    assert run(REFUSING.replace("TWO", str(both)), tmp_path / "run", grace_s=10.0) == 2
    assert capfd.readouterr().err.split("\n").count("no such prompt file") == 1


@pytest.mark.parametrize("other", [None, "logs/server_0.log", "config.yaml"])
def test_discarded_logs_take_nothing_else_with_them(tmp_path: Path, other: str | None) -> None:
    logs = tmp_path / "run" / "logs"
    assert run(REFUSING.replace("TWO", "True"), tmp_path / "run", grace_s=10.0) == 2
    assert "no such prompt file" in read(logs / "rank_1.err")
    if other is not None:
        (tmp_path / "run" / other).write_text("of another command")
    discard_logs(logs, ranks=2)
    left = [str(path.relative_to(tmp_path / "run")) for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ([] if other is None else [other])
    assert (tmp_path / "run").exists() == (other is not None)
