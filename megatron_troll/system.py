"""Files that a kill cannot leave half written, processes that end with their parent, and the signals by
which a run is asked to stop."""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` in one step: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def flush(path: Path) -> None:
    """Blocks until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have this process sent `number` when the one that started it dies, however that happens (Linux)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def spared() -> Iterator[None]:
    """Processes that this thread starts inside go on when this one is asked to stop: Slurm, and Ctrl-C in a
    terminal, signal every process of a job, helpers without which nothing can be saved too. They begin with
    these signals blocked; here they wait, or reach another thread, until the block ends."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        # Python's own helper process. Where this starts it, it unblocks two of them again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class Interrupts:
    """Whether Ctrl-C, SIGTERM or SIGUSR1 has been asked of this process. A run stops between two steps."""

    asked: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Remember such signals, instead of ending, until the block ends; those that were blocked so far come
    now. A SIGTERM or SIGUSR1 that whoever started this process had ignored stays so. Needs the main
    thread."""
    interrupts = Interrupts()
    heard = [n for n in ASKING if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupts.handle) for number in heard}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
