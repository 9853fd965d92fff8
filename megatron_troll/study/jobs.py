"""Running commands as subprocesses, a few at a time."""

import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_troll.system import Interrupts

POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """A command whose output is appended to `log`."""

    name: str
    argv: tuple[str, ...]
    log: Path


@dataclass(frozen=True)
class Ended:
    """A finished job with its exit code and duration."""

    job: Job
    code: int
    seconds: float


def run_jobs(
    jobs: Sequence[Job], at_once: int, interrupts: Interrupts, ended: Callable[[Ended], None]
) -> None:
    """Run `jobs` in order, `at_once` at a time, and call `ended` for each, whatever its exit code. When asked
    to stop, start no more, send SIGTERM to the running ones and wait for them. Blocks."""
    waiting, running, told = deque(jobs), dict[Job, tuple[subprocess.Popen[bytes], float]](), False
    while running or (waiting and not interrupts.asked):
        while waiting and len(running) < at_once and not interrupts.asked:
            job = waiting.popleft()
            running[job] = _start(job), time.monotonic()
        if interrupts.asked and not told:
            for process, _ in running.values():
                process.terminate()
            told = True
        time.sleep(POLL_S)
        for job, (process, began) in list(running.items()):
            if process.poll() is not None:
                del running[job]
                ended(Ended(job, process.returncode, time.monotonic() - began))


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        # In its own session, so that the terminal does not send Ctrl-C to it: run_jobs stops it.
        return subprocess.Popen(job.argv, stdout=log, stderr=log, start_new_session=True)
