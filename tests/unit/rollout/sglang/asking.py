"""A client in front of fake servers."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_troll.config.serving import SGLang
from megatron_troll.rollout.engine import Answer
from megatron_troll.rollout.sglang.client import Client, Question
from megatron_troll.rollout.sglang.http import Http
from megatron_troll.rollout.sglang.servers import Servers
from megatron_troll.rollout.sglang.versions import Versions
from megatron_troll.rollout.sglang.wire import Ask
from tests.sglang.model import VOCAB
from tests.sglang.recordings import GREEDY, LENGTH, NEVER, PROMPT
from tests.unit.rollout.sglang.fake import Fake

VERSIONS = Versions("run", "0123abcd")


@dataclass
class Asked:
    """What came of some questions. `times`: how often each was answered."""

    answers: dict[int, Answer] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)

    def add(self, i: int, answer: Answer) -> None:
        self.answers[i] = answer
        self.times[i] = self.times.get(i, 0) + 1


def question(name: str = "p#0") -> Question:
    return Question(name, Ask(PROMPT, LENGTH, GREEDY, NEVER, top_k=8, vocab=VOCAB, seed=1))


def questions(count: int) -> list[Question]:
    return [question(f"p{i}#0") for i in range(count)]


def config(**changes: Any) -> SGLang:
    return SGLang(**({"attempts": 3, "patience_s": 1.0, "deadline_s": 30.0} | changes))


def draw(
    fakes: Sequence[Fake],
    count: int,
    meanwhile: Callable[[Client, Servers], Any] | None = None,
    discover: Callable[[], Sequence[str]] | None = None,
    **changes: Any,
) -> Asked:
    """`count` questions answered by the servers, which all have version 1 of the weights. `meanwhile` is a
    coroutine function that runs beside."""
    for fake in fakes:
        fake.version = VERSIONS.called(1)
    asked = Asked()

    async def run() -> None:
        http = Http(None)
        try:
            servers = Servers(
                config(**changes), discover or (lambda: [fake.url for fake in fakes]), checker(http)
            )
            client = Client(config(**changes), http, servers, VERSIONS)
            await servers.ready()
            await servers.want(VERSIONS.called(1))
            beside = asyncio.ensure_future(meanwhile(client, servers)) if meanwhile else None
            try:
                await client.draw(questions(count), asked.add)
            finally:
                if beside:
                    beside.cancel()
                    with suppress(asyncio.CancelledError):
                        await beside
        finally:
            await http.close()

    asyncio.run(run())
    return asked


def checker(http: Http) -> Callable[[str], Any]:
    async def check(url: str) -> str:
        await http.get(url, "/health")
        return (await http.get(url, "/model_info"))["weight_version"]

    return check


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Waits for what another thread does."""
    for _ in itertools.takewhile(lambda _: not condition(), range(int(limit_s / 0.01))):
        time.sleep(0.01)
    assert condition()
