"""A hang shows which rank waits where.

Each rank writes what it is doing to heartbeat/rank_N.json. A rank that makes no progress may wait for one
that does; when none has made any for the timeout, the first to find out raises an alarm (a file); every rank
that sees it writes the stacks of its threads beside it and leaves with EXIT_HANG, the first one after
printing a table of all ranks. A rank whose interpreter cannot run at all (stuck in C code with the lock held)
is written out and ended by faulthandler's own thread.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from megatron_troll.system import write_atomic

EXIT_HANG = 75
POLLS_PER_HEARTBEAT = 10


@dataclass(frozen=True)
class Heartbeat:
    """What one rank last said. since: when it last made progress, seconds since the epoch."""

    rank: int
    phase: str
    since: float
    host: str
    pid: int


class Watchdog:
    """Entered on every rank for the life of the run; `folder` is shared by all of them.

    `with watchdog.phase(name)` and `watchdog.beat()` are progress. The timeout must exceed the longest
    stretch between two of them.
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
        """Progress inside a long phase: a decoded token, a finished micro-batch. Costs two clock reads."""
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
        """Whether no rank has made progress for the timeout. The heartbeats of the others are read only when
        this rank has made none, and then not before they in turn could be over it."""
        now = time.monotonic()
        if now <= max(self._progress + self._timeout, self._patience):
            return False
        beats = [read_heartbeat(self._folder, rank) for rank in range(self._world)]
        newest = max((beat.since for beat in beats if beat is not None), default=0.0)
        unwritten = POLLS_PER_HEARTBEAT * self._poll
        self._patience = now + self._timeout + unwritten - (time.time() - newest)
        return now > self._patience

    def _arm(self) -> None:
        """Unless this is called again in time, because no Python thread can run: stacks and exit code 1."""
        faulthandler.dump_traceback_later(max(self._timeout, 1.0), exit=True, file=self._stacks)

    def _write_or_say(self) -> None:
        """A full disk must not end the thread: the run would then be taken for hung."""
        try:
            self._write()
        except OSError as error:
            sys.stderr.write(f"watchdog: no heartbeat written in {self._folder}: {error}\n")

    def _alarmed(self) -> bool:
        """Whether another rank of this run has raised the alarm; one left by an earlier run is older than
        this rank's first heartbeat on the same file system."""
        try:
            return alarm_path(self._folder).stat().st_mtime > self._started
        except FileNotFoundError:
            return False

    def _raise_alarm(self) -> None:
        """Give the others three polls to see the alarm and say where they are, then print them all."""
        write_atomic(alarm_path(self._folder), f"rank {self._rank}\n")
        self._say_where()
        time.sleep(3 * self._poll)
        sys.stderr.write(hang_table(self._folder, self._world, self._timeout, time.time()))
        sys.stderr.flush()
        os._exit(EXIT_HANG)

    def _follow(self) -> None:
        """Leave after the rank that prints, which a launcher then takes for the first that failed."""
        self._say_where()
        time.sleep(6 * self._poll)
        os._exit(EXIT_HANG)

    def _say_where(self) -> None:
        self._write_or_say()
        faulthandler.dump_traceback(self._stacks, all_threads=True)


def hang_table(folder: Path, world: int, timeout_s: float, now: float) -> str:
    """Which rank waits in which phase for how long, and where its stacks are."""
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
    """None where the rank has not written any."""
    try:
        return Heartbeat(**json.loads(heartbeat_path(folder, rank).read_text()))
    except FileNotFoundError:
        return None


def heartbeat_path(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.json"


def stacks_path(folder: Path, rank: int) -> Path:
    return folder / f"hang_rank_{rank}.txt"


def alarm_path(folder: Path) -> Path:
    return folder / "alarm"
