"""Being asked to stop, remembered until the run can."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass
class Interrupts:
    """Whether Ctrl-C, SIGTERM or SIGUSR1 has been asked of this process. A run stops between two steps."""

    asked: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Remember such signals, instead of ending, until the block ends; those that were blocked so far come
    now. Needs the main thread."""
    interrupts = Interrupts()
    before = {number: signal.signal(number, interrupts.handle) for number in ASKING}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
