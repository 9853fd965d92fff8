"""A client in front of fake servers."""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

from megatron_troll.config import SGLang
from megatron_troll.rollout.sglang.client import Client, NamedRequest
from megatron_troll.rollout.sglang.servers import ServerPool
from megatron_troll.rollout.sglang.wire import GenerationRequest
from tests.sglang.asking import VERSIONS, Asked, Asking, Parts
from tests.sglang.model import VOCAB
from tests.sglang.recordings import GREEDY, LENGTH, NEVER, PROMPT
from tests.unit.rollout.sglang.fake import Fake


def question(name: str = "p#0") -> NamedRequest:
    return NamedRequest(name, GenerationRequest(PROMPT, LENGTH, GREEDY, NEVER, top_k=8, vocab=VOCAB, seed=1))


def questions(count: int) -> list[NamedRequest]:
    return [question(f"p{i}#0") for i in range(count)]


def config(**changes: Any) -> SGLang:
    return SGLang(**({"attempts": 3, "patience_s": 1.0, "deadline_s": 30.0} | changes))


def generate(
    fakes: Sequence[Fake],
    count: int,
    meanwhile: Callable[[Client, ServerPool], Any] | None = None,
    discover: Callable[[], Sequence[str]] | None = None,
    **changes: Any,
) -> Asked:
    """`count` questions answered by the servers, which all have version 1 of the weights. `meanwhile` is a
    coroutine function that runs beside."""
    for fake in fakes:
        fake.version = VERSIONS.called(1)

    async def beside(parts: Parts) -> None:
        if meanwhile is not None:
            await meanwhile(parts.client, parts.servers)

    asking = Asking(discover or (lambda: [fake.url for fake in fakes]), config(**changes))
    return asking.generate(questions(count), beside)


def until(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Waits for what another thread does."""
    for _ in itertools.takewhile(lambda _: not condition(), range(int(limit_s / 0.01))):
        time.sleep(0.01)
    assert condition()
