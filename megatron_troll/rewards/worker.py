"""Runs a verifier in a process of its own, so that it can be killed if it hangs."""

import contextlib
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.reward import MachineError, VerifierCall, attempt, build
from megatron_troll.system import spared

START_LIMIT_S = 120.0


class Ready:
    """A worker's first message: its verifier is built."""


@dataclass(frozen=True)
class Failed:
    """A worker's last message: the exception with which its verifier could not be built, or with which the
    machine failed."""

    what: str


def serve(connection: Connection, config: RewardConfig) -> None:
    """Build the verifier, send Ready or Failed, then answer each VerifierCall by its value or Raised.
    Ends with Failed if the machine fails."""
    try:
        verifier = build(config)
    except Exception:
        connection.send(Failed(traceback.format_exc()))
        raise
    connection.send(Ready())
    while True:
        try:
            question: VerifierCall = connection.recv()
        except EOFError:
            return
        try:
            value = attempt(question, verifier)
        except MachineError as error:
            connection.send(Failed(str(error)))
            return
        connection.send(value)


class Worker:
    """A worker process, on the trainer's side. `task` is the index of its current task, None while it starts
    or is idle; `deadline` is the time, in time.monotonic() seconds, by which it must have answered."""

    def __init__(self, config: RewardConfig):
        # A plain fork would inherit the trainer's threads and devices.
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.connection, child = context.Pipe()
        self._process = context.Process(target=serve, args=(child, config), daemon=True)
        with spared():
            self._process.start()
        child.close()
        self.task: int | None = None
        self.ready = False
        self.deadline = time.monotonic() + START_LIMIT_S

    @property
    def waited_for(self) -> bool:
        return self.task is not None or not self.ready

    def ask(self, task: int, question: VerifierCall, limit_s: float) -> None:
        self.task = task
        self.deadline = time.monotonic() + limit_s
        # A worker that died while idle is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(question)

    def exit_code(self) -> int:
        """Exit code of a process whose connection broke; negative if a signal ended it."""
        self._process.join()
        return self._process.exitcode or 0

    def stop(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()
