"""A process whose group is asked to stop keeps the helpers that it needs until it has."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, nullcontext

import pytest

from megatron_troll.system import ASKING, spared


def still_runs_after(number: int, context: AbstractContextManager[None]) -> bool:
    with context:
        process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(b"\n")
    return process.returncode == 0


# Not SIGINT: a shell that puts these tests in the background has it ignored for all their processes.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_helpers_go_on(number):
    assert still_runs_after(number, spared())
    assert not still_runs_after(number, nullcontext())


def test_the_signals_of_this_process_are_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with spared():
        assert before | set(ASKING) == signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert before == signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_pythons_own_helper_processes_are_spared_too():
    """The resource tracker unblocks signals where it starts, which the first spawn of a program does."""
    program = "from tests.unit.test_system import manager_survives; assert manager_survives()"
    subprocess.run([sys.executable, "-c", program], check=True)


def manager_survives() -> bool:
    with spared():
        manager = multiprocessing.get_context("spawn").Manager()
    for number in ASKING:
        os.kill(manager._process.pid, number)  # pyright: ignore[reportAttributeAccessIssue]
    return manager.list([1])[0] == 1
