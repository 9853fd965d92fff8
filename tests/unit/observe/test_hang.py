"""Real processes that hang leave their stacks and a table of who waited where."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from megatron_troll.observe.hang import EXIT_HANG

TIMEOUT_S = 1.0

RANK = """
import re, sys, time
from pathlib import Path
from megatron_troll.observe.hang import Watchdog

def wait_for_rank_1():
    time.sleep(60)

def hold_the_interpreter():
    re.match(r"(a+)+$", "a" * 40 + "b")

folder, rank, world, timeout, phase, work = sys.argv[1:]
with Watchdog(Path(folder), int(rank), int(world), float(timeout)) as watchdog:
    with watchdog.phase(phase):
        exec(work)
"""


def start(folder: Path, rank: int, world: int, phase: str, work: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RANK, str(folder), str(rank), str(world), str(TIMEOUT_S), phase, work]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    with process:
        try:
            _, stderr = process.communicate(timeout=20)
        finally:
            process.kill()
    return process.returncode, stderr


def test_every_rank_says_where_it_waits(tmp_path: Path) -> None:
    """Rank 0 hangs from the start; rank 1 makes progress for a while and then hangs too. Whoever finds out
    first prints the table; both may."""
    work = f"""
while not Path({str(tmp_path / "rank_0.json")!r}).exists():
    time.sleep(0.02)
    watchdog.beat()
for _ in range(50):
    time.sleep(0.02)
    watchdog.beat()
time.sleep(60)
"""
    later = start(tmp_path, 1, 3, "reward", work)
    wait_for(tmp_path / "rank_1.json")
    stuck = start(tmp_path, 0, 3, "generation", "wait_for_rank_1()")
    codes, tables = zip(end(later), end(stuck))
    assert codes == (EXIT_HANG, EXIT_HANG)
    table = max(tables)
    assert "No progress for 1 s" in table
    assert re.search(rf"rank 0: generation for [1-9] s, pid {stuck.pid} on ", table)
    assert re.search(rf"rank 1: reward for [1-9] s, pid {later.pid} on ", table)
    assert f"stacks in {tmp_path / 'hang_rank_1.txt'}" in table
    assert "rank 2: never started" in table
    assert "wait_for_rank_1" in (tmp_path / "hang_rank_0.txt").read_text()
    assert "<module>" in (tmp_path / "hang_rank_1.txt").read_text()


def test_a_rank_may_wait_for_one_that_makes_progress(tmp_path: Path) -> None:
    busy = start(tmp_path, 1, 2, "reward", "for _ in range(200): time.sleep(0.02); watchdog.beat()")
    wait_for(tmp_path / "rank_1.json")
    waiting = start(tmp_path, 0, 2, "evaluation", f"time.sleep({2.5 * TIMEOUT_S})")
    assert end(waiting) == (0, "")
    assert end(busy) == (0, "")


def test_an_interpreter_that_cannot_run_is_still_written_out(tmp_path: Path) -> None:
    code, _ = end(start(tmp_path, 0, 1, "reward", "hold_the_interpreter()"))
    assert code == 1
    assert "hold_the_interpreter" in (tmp_path / "hang_rank_0.txt").read_text()


def test_progress_keeps_a_rank_alive(tmp_path: Path) -> None:
    work = "for _ in range(30): time.sleep(0.06); watchdog.beat()"
    assert end(start(tmp_path, 0, 1, "evaluation", work)) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["rank_0.json"]


def test_an_error_passes_through(tmp_path: Path) -> None:
    code, stderr = end(start(tmp_path, 0, 1, "reward", "raise KeyError('sample')"))
    assert code == 1
    assert stderr.splitlines()[-1] == "KeyError: 'sample'"


def test_the_alarm_of_an_earlier_run_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "alarm").write_text("rank 0\n")
    os.utime(tmp_path / "alarm", (time.time() - 5, time.time() - 5))
    assert end(start(tmp_path, 0, 1, "generation", "time.sleep(0.5)")) == (0, "")


def test_a_heartbeat_that_cannot_be_written_is_said_and_does_not_end_the_run(tmp_path: Path) -> None:
    blocked = tmp_path / "rank_0.json"
    work = f"""
Path({str(blocked)!r}).unlink()
Path({str(blocked)!r}).mkdir()
for _ in range(30): time.sleep(0.05); watchdog.beat()
"""
    code, stderr = end(start(tmp_path, 0, 1, "generation", work))
    assert code == 0
    assert "no heartbeat written" in stderr


def wait_for(path: Path) -> None:
    limit = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < limit, f"{path} did not appear"
        time.sleep(0.02)
