"""Files that a kill cannot leave half written, temporary folders that the next start removes, processes that
end with their parent, and the signals that ask a run to stop."""

import ctypes
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
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


TEMPORARY, SEGMENTS = "mtroll-", "segments"
# A socket's path has at most 107 bytes, 49 of them for the names that multiprocessing and we add to TMPDIR.
LONGEST_PARENT = 58


def _temporary_parent() -> str:
    """TMPDIR, or /tmp if sockets in a folder below TMPDIR would have too long a path."""
    named = tempfile.gettempdir()
    return named if len(os.fsencode(named)) <= LONGEST_PARENT else "/tmp"


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that lasts as long as the block or, if its process is killed, until `remove_abandoned`. It is
    known by a locked file `lock`; its file `segments` may name shared memory to remove with it. Raises
    OSError if it cannot be made."""
    folder, lock = _locked_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
        os.close(lock)


def work_in_temporary_folder() -> None:
    """Give this process and those that it starts a folder like `temporary_folder` for temporary files."""
    folder, _ = _locked_folder()
    folder.chmod(0o711)  # a sandbox runs programs as another user in a folder below
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    # No `with`, whose end a forked process would run too; and after multiprocessing has removed its own
    # folders, at -100.
    Finalize(None, shutil.rmtree, (folder,), exitpriority=-200)


def _locked_folder() -> tuple[Path, int]:
    """A new folder, and the descriptor that holds its lock."""
    folder = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=_temporary_parent()))
    lock = os.open(folder / "unlocked", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(folder / "unlocked", folder / "lock")
    return folder, lock


def remove_abandoned() -> None:
    """Remove the temporary folders of killed processes, and the shared memory that they name."""
    for lock in Path(_temporary_parent()).glob(f"{TEMPORARY}*/lock"):
        with suppress(OSError), open(lock, "r+") as held:  # else in use, or another user's
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_segments(lock.parent)
            shutil.rmtree(lock.parent)


def remove_segments(folder: Path) -> None:
    """Remove the shared memory that a temporary folder names, unless a process has it mapped."""
    with suppress(FileNotFoundError):
        named = set((folder / SEGMENTS).read_text().splitlines())
        for path in named - segments(Path("/proc").glob("[0-9]*")):
            Path(path).unlink(missing_ok=True)


def segments(processes: Iterable[Path]) -> set[str]:
    """Paths of the shared memory that processes, given by their folders in /proc, have mapped."""
    found = set()
    for process in processes:
        with suppress(OSError):  # it has ended, or is another user's
            lines = (process / "maps").read_text().splitlines()
            found |= {line.split(maxsplit=5)[5] for line in lines if " /dev/shm/" in line}
    return found


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
