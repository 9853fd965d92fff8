"""What goes wrong with disks and processes, on purpose."""

import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_troll.rewards.jail import children_of


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, in this process and its children."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def signal_helpers() -> list[str]:
    """What Slurm does to a step that is preempted, except to this process: SIGTERM and SIGUSR1 to everything
    that it started. Their command lines."""
    told = []
    for pid in descendants(os.getpid()):
        with suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
            told.append(Path(f"/proc/{pid}/cmdline").read_text())
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGUSR1)
    return told


def descendants(parent: int) -> list[int]:
    children = children_of(parent)
    return [*children, *(pid for child in children for pid in descendants(child))]
