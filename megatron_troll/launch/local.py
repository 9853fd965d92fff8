"""Ranks of one command on this machine, as plain subprocesses that start and end together."""

import codecs
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_troll.launch.ports import free_port
from megatron_troll.launch.slurm.network import interface_with
from megatron_troll.system import ASKING, LAST_WORDS, REFUSED, end_with_parent

GRACE_S = 15.0
TAIL_LINES = 40
LAST_WORDS_BYTES = 100_000
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Rank:
    """One process in its own session, the file to which its stderr is appended from byte `start`, and the
    descriptor of a file in memory for its last words."""

    number: int
    process: subprocess.Popen[bytes]
    stderr: Path
    start: int
    words: int

    def said(self) -> list[str]:
        """The non-empty lines of the rank's stderr since this launch."""
        try:
            with open(self.stderr, "rb") as file:
                file.seek(self.start)
                return _lines(file.read())
        except OSError:  # the run folder is gone
            return []

    def last_words(self) -> list[str]:
        """The lines in which the rank said why it ended (system.last_words): on a full disk they are nowhere
        else."""
        return _lines(os.pread(self.words, LAST_WORDS_BYTES, 0))

    def kill(self) -> None:
        """Kill the rank and every process it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@dataclass(frozen=True)
class Failure:
    """The rank that failed first of `ranks`. code: as Popen gives it (negative: killed by that signal)."""

    rank: Rank
    code: int
    ranks: tuple[Rank, ...]

    @property
    def exit_code(self) -> int:
        return self.code if self.code > 0 else 128 - self.code

    @property
    def reason(self) -> str:
        if self.code > 0:
            return f"exit code {self.code}"
        hint = ", as the kernel does when memory runs out" if -self.code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-self.code).name}{hint}"

    def __str__(self) -> str:
        """One line: which rank failed, how, and the last line of its stderr."""
        said = self.rank.last_words() or self.rank.said()
        last = said[-1].strip() if said else f"it wrote nothing to {self.rank.stderr}"
        return f"rank {self.rank.number} failed ({self.reason}): {last}"


def _lines(text: bytes) -> list[str]:
    return [line for line in text.decode(errors="replace").splitlines() if line.strip()]


def launch(argv: Sequence[str], ranks: int, threads: int, log_dir: Path, grace_s: float = GRACE_S) -> int:
    """Run `argv` as a world of `ranks` processes of `threads` CPU threads and return the exit code of the
    job. The last line of a failing rank's stderr is printed last. See `run_ranks`."""
    port = free_port()
    environments = {rank: rank_environment(rank, ranks, port, threads) for rank in range(ranks)}
    failure = run_ranks(argv, environments, log_dir, grace_s)
    if failure is None:
        return 0
    _tell(failure)
    return failure.exit_code


def discard_logs(log_dir: Path, ranks: int) -> None:
    """Delete the logs of ranks that refused to begin, and their folder and the run's if nothing else is
    there."""
    for rank in range(ranks):
        for path in _logs(log_dir, rank):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        log_dir.rmdir()
        log_dir.parent.rmdir()


def _logs(log_dir: Path, rank: int) -> tuple[Path, Path]:
    """The files for stderr and stdout of a rank."""
    return log_dir / f"rank_{rank}.err", log_dir / f"rank_{rank}.out"


def run_ranks(
    argv: Sequence[str],
    environments: Mapping[int, Mapping[str, str]],
    log_dir: Path,
    grace_s: float = GRACE_S,
) -> Failure | None:
    """Run `argv` once for each rank of `environments` (rank -> variables added to our environment).

    Rank 0 writes to this terminal; the stdout of the other ranks and the stderr of all are appended to
    log_dir/rank_N.out and .err, and rank 0's stderr is also shown. The first SIGINT, SIGTERM or SIGUSR1 is
    forwarded to every rank, which may then take as long as a checkpoint needs; the third one kills the ranks.
    A rank starts with these signals blocked, and unblocks them when it can handle them (system.watched). If a
    rank fails, the others have `grace_s` to end by themselves and as long again after SIGTERM; that failure
    is returned. Blocks; needs the main thread, for its signal handlers.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    started: list[Rank] = []
    with _signals_handed_to(started):
        for number, added in environments.items():
            started.append(_spawn(argv, {**os.environ, **added}, number, log_dir))
        with _shown([rank for rank in started if rank.number == 0]):
            failure = _wait(started, grace_s)
    if failure is not None:
        for rank in started:
            rank.kill()
    return failure


def rank_environment(rank: int, world: int, port: int, threads: int) -> dict[str, str]:
    """The variables that torch.distributed's `env://` reads, the CPU threads of one rank, and the network
    interface of a world on one machine, unless our own environment names one."""
    loopback = interface_with(LOOPBACK)
    chosen = {name: os.environ.get(name, loopback) for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(threads),
        **chosen,
    }


def _spawn(argv: Sequence[str], env: dict[str, str], number: int, log_dir: Path) -> Rank:
    """Start a rank in its own session: a Ctrl-C at the terminal reaches it only through this process."""
    errors, output = _logs(log_dir, number)
    words = os.memfd_create(f"rank_{number}")
    with open(errors, "ab") as stderr, open(output, "ab") as stdout:
        start = stderr.tell()
        process = subprocess.Popen(
            argv,
            env={**env, LAST_WORDS: str(words)},
            pass_fds=(words,),
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=_before_its_program,
        )
    return Rank(number, process, errors, start, words)


def _before_its_program() -> None:
    """Let this rank get SIGTERM when its parent dies in any way (Linux prctl). It may arrive twice, because
    the rank may be handed from one dying thread of the parent to another. The stop signals stay blocked, so
    that they wait until the rank has finished its imports."""
    end_with_parent(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, ASKING)


@contextmanager
def _signals_handed_to(ranks: list[Rank]) -> Iterator[None]:
    received = 0

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        for rank in ranks:
            if received == 1:
                rank.process.send_signal(number)
            elif received == 3:
                rank.kill()
        if received == 2:
            sys.stderr.write("Already stopping, the checkpoint is being written. Once more kills the job.\n")

    before = {number: signal.signal(number, hand_on) for number in ASKING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[Rank], grace_s: float) -> Failure | None:
    """Wait until every rank has ended. A thread per rank reports its end, so that the first one is known."""
    ended: queue.Queue[tuple[Rank, int]] = queue.Queue()
    for rank in ranks:
        threading.Thread(target=lambda r: ended.put((r, r.process.wait())), args=(rank,)).start()
    running = list(ranks)
    failure: Failure | None = None
    due: list[tuple[float, signal.Signals]] = []
    while running:
        with suppress(queue.Empty):
            rank, code = ended.get(timeout=0.1)
            running.remove(rank)
            if code != 0 and failure is None:
                failure = Failure(rank, code, tuple(ranks))
                now = time.monotonic()
                due = [(now + grace_s, signal.SIGTERM), (now + 2 * grace_s, signal.SIGKILL)]
        if due and time.monotonic() > due[0][0]:
            _, number = due.pop(0)
            for rank in running:
                rank.kill() if number == signal.SIGKILL else rank.process.send_signal(number)
    return failure


@contextmanager
def _shown(ranks: Sequence[Rank]) -> Iterator[None]:
    """Copy the ranks' stderr to ours as it grows. Unlike a pipe, a file outlives either process."""
    done = threading.Event()

    def follow(rank: Rank) -> None:
        with open(rank.stderr, "rb") as file:
            file.seek(rank.start)
            last, decoder = False, codecs.getincrementaldecoder("utf-8")("replace")
            while not last:
                last = done.wait(0.2)
                sys.stderr.write(decoder.decode(file.read(), final=last))
                sys.stderr.flush()

    threads = [threading.Thread(target=follow, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def _tell(failure: Failure) -> None:
    """Print the end of the failing rank's stderr, unless already shown, and one line that names the rank. All
    ranks refuse the same inputs with the same words: those are printed once and name no rank."""
    rank, said = failure.rank, failure.rank.said()
    if failure.code == REFUSED:
        shown = [line for other in failure.ranks if other.number == 0 for line in other.said()]
        sys.stderr.writelines(f"{line}\n" for line in rank.last_words() if line not in shown)
        return
    if rank.number != 0 and said:
        sys.stderr.write(f"The end of {rank.stderr}:\n" + "\n".join(said[-TAIL_LINES:]) + "\n")
    for line in [line for line in rank.last_words() if line not in said]:
        sys.stderr.write(f"{line}\n")
    sys.stderr.write(f"{failure}\n")
