"""One batch of requests in flight, and the answers received so far."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_troll.rollout.engine import Completion, Setup
from megatron_troll.rollout.sglang.client import NamedRequest
from megatron_troll.rollout.sglang.connection import Connection
from megatron_troll.rollout.sglang.journal import Journal, Stored
from megatron_troll.rollout.sglang.servers import OutOfDate
from megatron_troll.rollout.sglang.wire import GenerationRequest


@dataclass(frozen=True)
class Origin:
    """Identity of what answers come from. weights: the model's start, see `start_of`; unchecked: whether this
    run began at step 0, with nothing compared to an earlier start: what that trained may be another model."""

    weights: str
    unchecked: bool

    def hash(self, ask: GenerationRequest) -> str:
        """Hash of a request and of the weights that the run started from."""
        return hashlib.sha256(json.dumps([self.weights, ask.body("")], sort_keys=True).encode()).hexdigest()

    def has(self, stored: Stored, ask: GenerationRequest) -> bool:
        """Whether a stored answer is one to `ask`."""
        trained = bool(stored.answer.versions.any())
        return stored.asked == self.hash(ask) and not (self.unchecked and trained)


def start_of(setup: Setup) -> str:
    """Identity of the weights that the sampled model had at step 0: its settings, and size and time of the
    files in its folder. Raises OSError."""
    model = setup.config.models.drawing
    files = sorted((*setup.folder.glob("*.safetensors*"), *setup.folder.glob("*.json")))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return json.dumps([str(setup.folder), model.init, setup.config.seed, stats])


@dataclass
class GenerationBatch:
    """Rank 0's part of generating a batch. Answers that `journal` has for the round are reused if `origin`
    says that they answer the questions, new ones are added to it."""

    questions: Sequence[NamedRequest]
    round: int
    journal: Journal | None
    origin: Origin
    answers: dict[int, Completion] = field(default_factory=dict)
    _under_way: "Future[None] | None" = None

    def begin(self, connection: Connection) -> None:
        """Send the requests without waiting for answers."""
        there = {} if self.journal is None else self.journal.read(self.round)
        self.answers = {
            i: there[question.name].answer
            for i, question in enumerate(self.questions)
            if question.name in there and self.origin.has(there[question.name], question.ask)
        }
        self._ask(connection)

    def complete(self, connection: Connection) -> bool:
        """Wait for every answer. False if the servers need a sync first; the answers so far are kept."""
        if self._under_way is None:
            self._ask(connection)
        assert self._under_way is not None
        under_way, self._under_way = self._under_way, None
        try:
            connection.background.result(under_way)
        except OutOfDate:
            return False
        return True

    def _ask(self, connection: Connection) -> None:
        missing = [i for i in range(len(self.questions)) if i not in self.answers]

        def answered(place: int, answer: Completion) -> None:
            i = missing[place]
            self.answers[i] = answer
            if self.journal is not None:
                stored = Stored(self.origin.hash(self.questions[i].ask), answer)
                self.journal.add(self.round, self.questions[i].name, stored)

        self._under_way = connection.background.start(
            connection.client.generate([self.questions[i] for i in missing], answered)
        )
