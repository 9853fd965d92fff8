"""A stop that is asked for is remembered; outside the block signals do what they did before."""

import os
import signal

import pytest

from megatron_troll.system import watched


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_remembered_and_ends_nothing(number: signal.Signals) -> None:
    with watched() as interrupts:
        assert not interrupts.asked
        os.kill(os.getpid(), number)
        assert interrupts.asked


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_the_starter_ignores_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with watched() as interrupts:
            os.kill(os.getpid(), number)
            assert not interrupts.asked
    finally:
        signal.signal(number, before)


def test_the_handlers_of_before_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watched():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
