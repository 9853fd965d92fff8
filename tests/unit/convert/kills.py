"""A process that is killed at a chosen step of a conversion."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_troll.convert.draft import Summed

Convert = Callable[[Path, Path], Path]

# Forks from a server that has imported everything.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.unit.convert.kills", "tests.unit.convert.tiny_folders"])


def steps_of(convert: Convert, source: Path, target: Path) -> int:
    """Convert undisturbed; the number of steps that it took."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=_convert, args=(convert, source, target, None, sender))
    process.start()
    sender.close()
    steps = receiver.recv()
    process.join()
    assert process.exitcode == 0
    return steps


def kill_at(step: int, convert: Convert, source: Path, target: Path) -> None:
    """Convert until SIGKILL before the `step`-th step."""
    process = SERVER.Process(target=_convert, args=(convert, source, target, step, None))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def _convert(convert: Convert, source: Path, target: Path, last: int | None, sender: Any) -> None:
    """A step is whatever changes the disk: a file opened, half written, renamed or removed."""
    count = 0

    def step(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "half written")
        if changes or (event == "open" and arguments[1] in ("w", "wb")):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    write = Summed.write

    def write_halves(self: Summed, data: Any) -> int:
        view = memoryview(data).cast("B")
        first = write(self, view[: len(view) // 2])
        step("half written", ())
        return first + write(self, view[len(view) // 2 :])

    Summed.write = write_halves
    sys.addaudithook(step)
    convert(source, target)
    if sender is not None:
        sender.send(count)
