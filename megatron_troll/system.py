"""Files that a kill cannot leave half written, processes that end with their parent, and the signals that
ask a run to stop."""

import ctypes
import os
import signal
import socket
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import TextIO
from zipfile import BadZipFile

# Exit codes of a command: it failed after it had begun, or refused before anything was done.
FAILED, REFUSED = 1, 2

# The variable with the descriptor to which a rank writes its last words.
LAST_WORDS = "MTROLL_LAST_WORDS"

# Raised by json and numpy for a file that is not as it was written.
DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    EOFError,
    RuntimeError,
    BadZipFile,
    zlib.error,
)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` in one step: readers see the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with naming(path), open(part, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # on a full disk it would take the last room
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add `path` to an OSError of the block that names no file, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def last_words(text: str) -> None:
    """Say on stderr why this process ends, and in memory to the launcher, if it has one: the log of a rank
    lies in the run folder, whose disk may be full. The launcher keeps what is said first, the cause of what
    may follow."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        drop(sys.stderr)
    if LAST_WORDS in os.environ:
        descriptor = int(os.environ[LAST_WORDS])
        with suppress(OSError):
            if os.fstat(descriptor).st_size == 0:
                os.write(descriptor, f"{text}\n".encode(errors="replace"))


def drop(stream: TextIO) -> None:
    """Let whatever is written to `stream` go nowhere. What Python still holds back of it would fail again
    when the process ends, whose exit code would then be 120."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def flush(path: Path) -> None:
    """Block until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def address_towards(host: str) -> str:
    """This machine's IPv4 address on the route to `host`. Sends nothing. Raises OSError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return probe.getsockname()[0]


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
