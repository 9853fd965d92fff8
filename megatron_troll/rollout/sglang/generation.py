"""One batch of requests in flight, and the answers received so far."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.sglang.client import NamedRequest
from megatron_troll.rollout.sglang.connection import Connection
from megatron_troll.rollout.sglang.journal import Journal
from megatron_troll.rollout.sglang.servers import OutOfDate


@dataclass
class GenerationBatch:
    """Rank 0's part of generating a batch. Answers that `journal` has for the round are reused, new ones are
    added to it."""

    questions: Sequence[NamedRequest]
    round: int
    journal: Journal | None
    answers: dict[int, Completion] = field(default_factory=dict)
    _under_way: "Future[None] | None" = None

    def begin(self, connection: Connection) -> None:
        """Send the requests without waiting for answers."""
        there = {} if self.journal is None else self.journal.read(self.round)
        self.answers = {
            i: there[question.name]
            for i, question in enumerate(self.questions)
            if question.name in there and _width(there[question.name]) == question.ask.top_k
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
                self.journal.add(self.round, self.questions[i].name, answer)

        self._under_way = connection.background.start(
            connection.client.generate([self.questions[i] for i in missing], answered)
        )


def _width(answer: Completion) -> int:
    """Number of top-K entries of a stored answer: rollout.top_k may have changed since."""
    return 0 if answer.topk is None else answer.topk.ids.shape[1]
