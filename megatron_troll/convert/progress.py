"""Progress of a conversion: a bar on a terminal, otherwise a line about every ten seconds; rank 0 only."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from megatron_troll.observe.progress import duration

EVERY_S = 10.0


class NoProgress:
    """Shows nothing."""

    @contextmanager
    def counting(self, total: int, done: int) -> Iterator[None]:
        """Count bytes until the block ends; `done` of `total` are written already."""
        yield

    def advance(self, count: int) -> None:
        """Add `count` bytes that were written."""


class Lines(NoProgress):
    """Prints a plain line at most every ten seconds, and one at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = self._found = self._done = 0
        self._began = self._last = 0.0

    @contextmanager
    def counting(self, total: int, done: int) -> Iterator[None]:
        self._total, self._found, self._done = total, done, done
        self._began = self._last = time.monotonic()
        yield
        self._say(time.monotonic())

    def advance(self, count: int) -> None:
        # Files also hold headers, which are not part of the total.
        self._done = min(self._done + count, self._total)
        if (now := time.monotonic()) - self._last >= EVERY_S:
            self._last = now
            self._say(now)

    def _say(self, now: float) -> None:
        speed = (self._done - self._found) / max(now - self._began, 1e-9)
        left = duration(max(self._total - self._done, 0) / speed) if speed else "?"
        done, total = decimal(self._done), decimal(self._total)
        self._console.print(f"{done} of {total} | {decimal(int(speed))}/s | ETA {left}", highlight=False)


class Live(NoProgress):
    """A bar that is redrawn in place."""

    def __init__(self, console: Console) -> None:
        columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self._bar = Bar(TextColumn("converting"), *columns, console=console)

    @contextmanager
    def counting(self, total: int, done: int) -> Iterator[None]:
        self._task = self._bar.add_task("", total=total, completed=done)
        with self._bar:
            yield

    def advance(self, count: int) -> None:
        self._bar.advance(self._task, count)


def open_progress(console: Console, rank: int) -> NoProgress:
    """Progress display of a rank: rank 0 shows the bytes that it writes itself, other ranks show nothing."""
    if rank:
        return NoProgress()
    return Live(console) if console.is_terminal and not console.is_dumb_terminal else Lines(console)
