"""The signals by which a run is asked to stop, and processes that must not take them for theirs."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

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
