"""Watchdog that shows, when a run hangs, which rank waits in which phase.

Each rank writes its current phase to heartbeat/rank_N.json. A rank without progress may be waiting for one
that makes progress, so the run hangs only when no rank has made any for the timeout. The first rank that
notices raises an alarm (a file). Every rank that sees the alarm writes the stacks of its threads beside it
and exits with EXIT_HANG; the first rank prints a table of all ranks before it exits. If the interpreter of a
rank cannot run at all (stuck in C code that holds the GIL), faulthandler's own thread writes the stacks and
ends the process.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megatron_troll.system import last_words, write_atomic

EXIT_HANG = 75
POLLS_PER_HEARTBEAT = 10


@dataclass(frozen=True)
class Heartbeat:
    """The last report of one rank. since: time of its last progress, in seconds since the epoch."""

    rank: int
    phase: str
    since: float
    host: str
    pid: int


class Watchdog:
    """Context manager that every rank enters for the whole run; all ranks share `folder`.

    `with watchdog.phase(name)` and `watchdog.beat()` count as progress. The timeout must exceed the longest
    interval between two of them.
    """

    def __init__(self, folder: Path, rank: int, world: int, timeout_s: float) -> None:
        self._folder = folder
        self._rank = rank
        self._world = world
        self._timeout = timeout_s
        self._poll = min(1.0, timeout_s / 10)
        self._phase = "startup"
        self._since = time.time()
        self._progress = time.monotonic()
        self._patience = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._stacks = open(stacks_path(self._folder, self._rank), "w")
        self._write()
        self._started = heartbeat_path(self._folder, self._rank).stat().st_mtime
        self._arm()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()
        stacks_path(self._folder, self._rank).unlink()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        outer = self._phase
        self._mark(name)
        try:
            yield
        finally:
            self._mark(outer)

    def beat(self) -> None:
        """Record progress within a long phase: a token decoded, a micro-batch done. Costs two clock reads."""
        self._progress = time.monotonic()
        self._since = time.time()

    def _mark(self, phase: str) -> None:
        self._phase = phase
        self.beat()

    def _write(self) -> None:
        beat = Heartbeat(self._rank, self._phase, self._since, socket.gethostname(), os.getpid())
        write_atomic(heartbeat_path(self._folder, self._rank), json.dumps(asdict(beat)))

    def _watch(self) -> None:
        polls = 0
        while not self._stop.wait(self._poll):
            self._arm()
            polls += 1
            if polls % POLLS_PER_HEARTBEAT == 0:
                self._write_or_say()
            if self._alarmed():
                self._follow()
            elif self._hangs():
                self._raise_alarm()

    def _hangs(self) -> bool:
        """Whether no rank has made progress for the timeout. The other heartbeats are read only when this
        rank has made none, and read again only when they too could have exceeded the timeout."""
        now = time.monotonic()
        if now <= max(self._progress + self._timeout, self._patience):
            return False
        beats = [read_heartbeat(self._folder, rank) for rank in range(self._world)]
        newest = max((beat.since for beat in beats if beat is not None), default=0.0)
        unwritten = POLLS_PER_HEARTBEAT * self._poll
        self._patience = now + self._timeout + unwritten - (time.time() - newest)
        return now > self._patience

    def _arm(self) -> None:
        """Schedule faulthandler to write the stacks and exit with code 1, unless this is called again in
        time, which fails only if no Python thread can run."""
        faulthandler.dump_traceback_later(max(self._timeout, 1.0), exit=True, file=self._stacks)

    def _write_or_say(self) -> None:
        """Write the heartbeat. A full disk must not end this thread: the run would then look hung."""
        try:
            self._write()
        except OSError as error:
            with suppress(OSError):  # the rank's log may lie on the same disk
                sys.stderr.write(f"watchdog: no heartbeat written in {self._folder}: {error}\n")

    def _alarmed(self) -> bool:
        """Whether another rank of this run has raised the alarm. An alarm left by an earlier run is older
        than this rank's first heartbeat on the same file system."""
        try:
            return alarm_path(self._folder).stat().st_mtime > self._started
        except FileNotFoundError:
            return False

    def _raise_alarm(self) -> None:
        """Raise the alarm, give the others three polls to see it and report, then print them all and exit."""
        with suppress(OSError):  # every rank then raises its own alarm
            write_atomic(alarm_path(self._folder), f"rank {self._rank}\n")
        self._say_where()
        time.sleep(3 * self._poll)
        last_words(hang_table(self._folder, self._world, self._timeout, time.time()).rstrip())
        os._exit(EXIT_HANG)

    def _follow(self) -> None:
        """Exit after the rank that prints, so that a launcher reports that rank as the first that failed."""
        self._say_where()
        time.sleep(6 * self._poll)
        os._exit(EXIT_HANG)

    def _say_where(self) -> None:
        self._write_or_say()
        faulthandler.dump_traceback(self._stacks, all_threads=True)


def hang_table(folder: Path, world: int, timeout_s: float, now: float) -> str:
    """Table of ranks: phase in which each waits, for how long, and the file with its stacks."""
    lines = [f"No progress for {timeout_s:g} s (observe.hang_timeout_s). Every rank and what it was doing:"]
    for rank in range(world):
        beat = read_heartbeat(folder, rank)
        if beat is None:
            lines.append(f"  rank {rank}: never started")
            continue
        lines.append(
            f"  rank {rank}: {beat.phase} for {now - beat.since:.0f} s, pid {beat.pid} on {beat.host}, "
            f"stacks in {stacks_path(folder, rank)}"
        )
    return "\n".join(lines) + "\n"


def read_heartbeat(folder: Path, rank: int) -> Heartbeat | None:
    """Read a rank's heartbeat file; None if the rank has not written one, or an earlier run left a damaged
    one there."""
    try:
        return Heartbeat(**json.loads(heartbeat_path(folder, rank).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"hang_rank_{rank}.txt"


def alarm_path(folder: Path) -> Path:
    return folder / "alarm"
