"""Commands side by side: in order, so many at once, stopped on request."""

import sys
from pathlib import Path

from megatron_troll.study.jobs import Ended, Job, run_jobs
from megatron_troll.system import Interrupts

WAIT_FOR_FILE = "import pathlib, time\nwhile not pathlib.Path({path!r}).exists(): time.sleep(0.01)"
STOP_WELL = """
import signal, time
signal.signal(signal.SIGTERM, lambda *_: exit(7))
print("up", flush=True)
while True:
    time.sleep(0.01)
"""


def job(folder: Path, name: str, code: str) -> Job:
    return Job(name, (sys.executable, "-c", code), folder / "logs" / f"{name}.log")


def test_every_job_runs_and_its_exit_code_and_output_are_told(tmp_path: Path) -> None:
    jobs = [job(tmp_path, str(code), f"print({code}); raise SystemExit({code})") for code in (0, 3, 0)]
    ended: list[Ended] = []
    run_jobs(jobs, 1, Interrupts(), ended.append)
    assert [(end.job.name, end.code) for end in ended] == [("0", 0), ("3", 3), ("0", 0)]
    assert (tmp_path / "logs" / "3.log").read_text() == "3\n"


def test_jobs_run_side_by_side(tmp_path: Path) -> None:
    """The first ends only after the second has."""
    path = str(tmp_path / "done")
    first = job(tmp_path, "first", WAIT_FOR_FILE.format(path=path))
    second = job(tmp_path, "second", f"open({path!r}, 'w').close()")
    ended: list[Ended] = []
    run_jobs([first, second], 2, Interrupts(), ended.append)
    assert sorted((end.job.name, end.code) for end in ended) == [("first", 0), ("second", 0)]


def test_a_request_to_stop_ends_what_runs_and_starts_no_more(tmp_path: Path) -> None:
    interrupts = Interrupts()
    running = job(tmp_path, "running", STOP_WELL)
    ended: list[Ended] = []

    def stop_once_up(end: Ended) -> None:
        ended.append(end)
        interrupts.asked = True

    path = str(running.log)
    up = f"import pathlib, time\nwhile 'up' not in pathlib.Path({path!r}).read_text(): time.sleep(0.01)"
    jobs = [running, job(tmp_path, "up", up), job(tmp_path, "never", "pass")]
    run_jobs(jobs, 2, interrupts, stop_once_up)
    assert [(end.job.name, end.code) for end in ended] == [("up", 0), ("running", 7)]
    assert not (tmp_path / "logs" / "never.log").exists()
