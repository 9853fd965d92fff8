"""Scoring of answers in parallel worker processes: a verifier that hangs or crashes affects only its own."""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.reward import Raised, Value, VerifierCall
from megatron_troll.rewards.worker import START_LIMIT_S, Failed, Worker

ATTEMPTS = 2


class RewardError(RuntimeError):
    """A verifier cannot be built, its processes cannot be kept alive, or the machine fails it; the message
    says why."""


@dataclass(frozen=True)
class ScoringTask:
    """One call of the verifier for one answer; error messages refer to it by `name`."""

    name: str
    question: VerifierCall


@dataclass
class Outcomes:
    """Return values of the verifier, by task index. Tasks that timed out, whose worker died at each attempt,
    or on which the verifier raised (`errors`: what), have no value."""

    values: dict[int, Value] = field(default_factory=dict)
    timeouts: set[int] = field(default_factory=set)
    crashes: set[int] = field(default_factory=set)
    errors: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.values) + len(self.timeouts) + len(self.crashes) + len(self.errors)

    def add(self, index: int, value: Value | Raised) -> None:
        if isinstance(value, Raised):
            self.errors[index] = value.what
        else:
            self.values[index] = value


class _Batch:
    """The tasks of one call: those not yet handed out, and the outcomes so far."""

    def __init__(self, tasks: Sequence[ScoringTask]):
        self.tasks = tasks
        self.queue = deque(range(len(tasks)))
        self.outcomes = Outcomes()
        self.killed_starts = 0
        self._attempts: Counter[int] = Counter()

    def crashed(self, index: int) -> None:
        self._attempts[index] += 1
        if self._attempts[index] < ATTEMPTS:
            self.queue.append(index)
        else:
            self.outcomes.crashes.add(index)


class WorkerPool:
    """Up to `size` workers, started when there is work and kept until `close`. `progress` is called after
    each answer."""

    def __init__(self, config: RewardConfig, size: int, progress: Callable[[], object]):
        self._config = config
        self._size = size
        self._progress = progress
        self._workers: list[Worker] = []

    def run(self, tasks: Sequence[ScoringTask]) -> Outcomes:
        """Run all tasks; blocks until each has an outcome. A worker over the time limit is killed and
        replaced; one that died (out of memory) is replaced and its task is retried once. Raises RewardError
        if the verifier cannot be built or the machine fails it."""
        batch = _Batch(tasks)
        try:
            while len(batch.outcomes) < len(tasks):
                self._hand_out(batch)
                for worker in self._answering():
                    self._receive(worker, batch)
                    self._progress()
        except BaseException:
            self.close()  # an answer still in a pipe would be counted in the next batch
            raise
        return batch.outcomes

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def _hand_out(self, batch: _Batch) -> None:
        while len(self._workers) < min(self._size, len(batch.tasks)):
            self._workers.append(Worker(self._config))
        for worker in self._workers:
            if not worker.waited_for and batch.queue:
                index = batch.queue.popleft()
                worker.ask(index, batch.tasks[index].question, self._config.timeout_s)

    def _answering(self) -> list[Worker]:
        """Workers that have answered, died or timed out; waits for the first one."""
        busy = [worker for worker in self._workers if worker.waited_for]
        patience = min(worker.deadline for worker in busy) - time.monotonic()
        wait([worker.connection for worker in busy], timeout=max(0.0, patience))
        now = time.monotonic()
        return [worker for worker in busy if worker.connection.poll() or now >= worker.deadline]

    def _receive(self, worker: Worker, batch: _Batch) -> None:
        try:
            if not worker.connection.poll():
                return self._overdue(worker, batch)
            answer = worker.connection.recv()
        except (EOFError, OSError):
            return self._died(worker, batch)
        if isinstance(answer, Failed):
            raise RewardError(f"{self._doing(worker, batch)}:\n{answer.what}")
        if worker.task is None:
            worker.ready = True
        else:
            batch.outcomes.add(worker.task, answer)
            worker.task = None

    def _overdue(self, worker: Worker, batch: _Batch) -> None:
        if worker.task is None:
            raise RewardError(f"{self._doing(worker, batch)}: it took more than {START_LIMIT_S:g} s")
        batch.outcomes.timeouts.add(worker.task)
        self._drop(worker)

    def _died(self, worker: Worker, batch: _Batch) -> None:
        code = worker.exit_code()
        batch.killed_starts += worker.task is None
        if (worker.task is None and code >= 0) or batch.killed_starts > ATTEMPTS * self._size:
            raise RewardError(f"{self._doing(worker, batch)}: its process ended with exit code {code}")
        if worker.task is not None:
            batch.crashed(worker.task)
        self._drop(worker)

    def _drop(self, worker: Worker) -> None:
        self._workers.remove(worker)
        worker.stop()

    def _doing(self, worker: Worker, batch: _Batch) -> str:
        at = "while it was built" if worker.task is None else f"on {batch.tasks[worker.task].name}"
        return f"reward {self._config.name!r} failed {at}"
