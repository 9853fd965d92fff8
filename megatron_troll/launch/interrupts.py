"""Being asked to stop, remembered until the run can."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from megatron_troll.system import ASKING


@dataclass
class Interrupts:
    """Whether Ctrl-C, SIGTERM or SIGUSR1 has been asked of this process. A run stops between two steps."""

    asked: bool = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


@contextmanager
def watched() -> Iterator[Interrupts]:
    """Remember such signals, instead of ending, until the block ends; those that were blocked so far come
    now. A SIGTERM or SIGUSR1 that whoever started this process had ignored stays so. Needs the main
    thread."""
    interrupts = Interrupts()
    heard = [n for n in ASKING if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupts.handle) for number in heard}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ASKING)
    try:
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
