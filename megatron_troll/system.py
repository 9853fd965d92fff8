"""Files that a kill cannot leave half written, processes that end with their parent, and the signals that
ask a run to stop."""

import ctypes
import os
import signal
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from zipfile import BadZipFile

# The variable with the descriptor to which a rank writes its last words.
LAST_WORDS = "MTROLL_LAST_WORDS"

# Raised by json and numpy for a file that is not as it was written.
DAMAGED = (OSError, ValueError, TypeError, LookupError, EOFError, RuntimeError, BadZipFile, zlib.error)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` in one step: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with open(part, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def last_words(text: str) -> None:
    """Say on stderr why this process ends, and in memory to the launcher, if it has one: the log of a rank
    lies in the run folder, whose disk may be full."""
    with suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    if LAST_WORDS in os.environ:
        with suppress(OSError):
            os.write(int(os.environ[LAST_WORDS]), f"{text}\n".encode(errors="replace"))


def flush(path: Path) -> None:
    """Block until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


PR_SET_PDEATHSIG = 1
LIBC = ctypes.CDLL(None)  # not loaded between fork and exec, where another thread's lock would never open


def end_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Let the kernel send `number` to this process when its parent dies in any way (Linux)."""
    LIBC.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)


ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def spared() -> Iterator[None]:
    """Protect the processes that this thread starts inside the block from the signals that ask a run to stop:
    Slurm, and Ctrl-C in a terminal, signal every process of a job, including helpers that saving needs. They
    start with these signals blocked; in this thread the signals wait until the block ends, or reach another
    thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
    try:
        # Python's own helper process; starting it unblocks two of the signals again.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass
class Interrupts:
    """Whether Ctrl-C, SIGTERM or SIGUSR1 asked this process to stop. A run stops between two steps."""

    asked: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Record these signals instead of ending the process, until the block ends; signals that were blocked
    before arrive now. A SIGTERM or SIGUSR1 that this process was started to ignore stays ignored. Needs the
    main thread."""
    interrupts = Interrupts()
    heard = [n for n in ASKING if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupts.handle) for number in heard}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
