"""Persistent CPU ranks for tests: the processes start once, and functions are sent to them.

A worker has torch with one thread and an initialised gloo process group, nothing else: no megatron.core, no
model-parallel groups. What a function sets up on its ranks it takes down again. torch is imported inside the
worker, after its environment is set.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

START_TIMEOUT_S = 120.0
COLLECTIVE_TIMEOUT_S = 240.0
GRACE_S = 5.0


class RankError(RuntimeError):
    """A rank raised, died or did not answer. The message holds the ranks and their tracebacks."""


class RankPool:
    """`world_size` gloo ranks on this machine. Use as a context manager.

    A pool in which a rank hung, died or failed while others did not is replaced by a fresh one at the next
    `run`, since its collectives may be out of step.
    """

    def __init__(self, world_size: int, timeout_s: float = 300.0) -> None:
        self.world_size = world_size
        self.timeout_s = timeout_s
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(*args)` on every rank; its results in rank order.

        `function` must be importable by name (defined at the top of a module); arguments and results must
        pickle. Raises RankError with the first failing rank's traceback first, or with the ranks that did
        not answer within `timeout_s`.
        """
        call = pickle.dumps((function, args))
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(call)
        return self._collect(self.timeout_s)

    def close(self) -> None:
        """Ends every rank: those that are idle leave by themselves, the others are killed."""
        for pipe in self._pipes:
            pipe.close()
        deadline = time.monotonic() + GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = os.path.join(self._folder.name, "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            # Not daemonic: asynchronous checkpoints start children of their own.
            process = context.Process(target=_serve, args=(theirs, rank, self.world_size, store))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._collect(START_TIMEOUT_S)

    def _collect(self, timeout_s: float) -> list[Any]:
        """One answer per rank. After the first failure the others get only a few seconds more."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = dict(enumerate(self._pipes))
        deadline = time.monotonic() + timeout_s
        while waiting and (left := deadline - time.monotonic()) > 0:
            ready = wait(list(waiting.values()), left)
            for rank in [rank for rank, pipe in waiting.items() if pipe in ready]:
                ok, value = self._receive(rank, waiting.pop(rank))
                (results if ok else failures)[rank] = value
            if failures:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if not failures and not waiting:
            return [results[rank] for rank in range(self.world_size)]
        if len(failures) < self.world_size:
            self._abandon(list(waiting))
        raise RankError(self._report(failures, list(waiting), timeout_s))

    def _receive(self, rank: int, pipe: Connection) -> tuple[bool, Any]:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(GRACE_S)
            return False, f"the process died with exit code {self._processes[rank].exitcode}\n"

    def _abandon(self, silent: list[int]) -> None:
        """Ranks that hang write their stacks to stderr (pytest shows it), then all are killed."""
        for rank in silent:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        if silent:
            time.sleep(0.5)
        for process in self._processes:
            process.kill()
        self.close()

    def _report(self, failures: dict[int, str], silent: list[int], timeout_s: float) -> str:
        lines: list[str] = []
        for text in dict.fromkeys(failures.values()):
            ranks = ", ".join(str(rank) for rank in failures if failures[rank] == text)
            lines.append(f"rank {ranks} of {self.world_size}: {text}")
        if silent:
            within = f"{GRACE_S:g} s after the failure" if failures else f"{timeout_s:g} s"
            lines.append(f"ranks {silent} of {self.world_size} did not answer within {within}")
        return "\n".join(lines)


def _serve(pipe: Connection, rank: int, world_size: int, store: str) -> None:
    """Body of one rank: joins the process group, then answers calls until the pipe closes."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
    }
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    _answer(pipe, _join_group, (rank, world_size, store))
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            break
        _answer(pipe, _call, (call,))
    _leave_group()
    os._exit(0)  # taking torch and Megatron down module by module would cost seconds


def _answer(pipe: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    try:
        answer = pickle.dumps((True, function(*args)))
    except BaseException as error:  # noqa: BLE001 - whatever it is, the test must see it
        summary = f"{type(error).__name__}: {error}"
        answer = pickle.dumps((False, f"{summary}\n{traceback.format_exc()}"))
    pipe.send_bytes(answer)


def _call(call: bytes) -> Any:
    function, args = pickle.loads(call)  # noqa: S301 - written by the parent process
    return function(*args)


def _join_group(rank: int, world_size: int, store: str) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
    )


def _leave_group() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
