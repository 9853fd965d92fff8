"""A client in front of servers, real or fake, without a trainer."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from megatron_troll.config import SGLang
from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.sglang.client import Client, NamedRequest
from megatron_troll.rollout.sglang.control import Control
from megatron_troll.rollout.sglang.http import QUICK_S, Http
from megatron_troll.rollout.sglang.servers import CatchUp, Router, ServerPool
from megatron_troll.rollout.sglang.wire import Versions

VERSIONS = Versions("run", "0123abcd")


@dataclass
class Asked:
    """What came of some questions. `times`: how often each was answered; `sent`: where each request went, and
    how many tokens it asked for."""

    answers: dict[int, Completion] = field(default_factory=dict)
    times: dict[int, int] = field(default_factory=dict)
    sent: list[tuple[str, int]] = field(default_factory=list)

    def add(self, i: int, answer: Completion) -> None:
        self.answers[i] = answer
        self.times[i] = self.times.get(i, 0) + 1


class Watched(Http):
    """Takes note of questions."""

    def __init__(self, key: str | None, asked: Asked) -> None:
        super().__init__(key)
        self._asked = asked

    async def post(self, url: str, path: str, body: Any, timeout: float | None = QUICK_S) -> Any:
        if path == "/generate":
            self._asked.sent.append((url, body["sampling_params"]["max_new_tokens"]))
        return await super().post(url, path, body, timeout)


@dataclass(frozen=True)
class Parts:
    """What a client is made of, for what goes on beside it."""

    client: Client
    servers: ServerPool
    control: Control
    asked: Asked


@dataclass(frozen=True)
class Asking:
    """Asks the servers that `discover` lists, which have version 1 of the weights or get it by `catch_up`."""

    discover: Callable[[], Sequence[str]]
    config: SGLang
    catch_up: Callable[[Control], CatchUp] | None = None
    key: str | None = None

    def generate(
        self,
        questions: Sequence[NamedRequest],
        meanwhile: Callable[[Parts], Coroutine[Any, Any, object]] | None = None,
    ) -> Asked:
        """Every answer. `meanwhile` runs beside, and is cancelled once all are there."""
        asked = Asked()

        async def run() -> None:
            http = Watched(self.key, asked)
            try:
                parts = await self._parts(http, asked)
                beside = asyncio.ensure_future(meanwhile(parts)) if meanwhile else None
                try:
                    await parts.client.generate(questions, asked.add)
                finally:
                    if beside:
                        beside.cancel()
                        with suppress(asyncio.CancelledError):
                            await beside
            finally:
                await http.close()

        asyncio.run(run())
        return asked

    async def _parts(self, http: Http, asked: Asked) -> Parts:
        router = None if self.config.router is None else Router(self.config.router, http)
        servers = ServerPool(self.config, self.discover, checker(http), router)
        control = Control(http, timeout_s=60.0)
        if self.catch_up is not None:
            servers.catch_up = self.catch_up(control)
        await servers.ready()
        await servers.want(VERSIONS.called(1))
        return Parts(Client(self.config, http, servers, VERSIONS), servers, control, asked)


def checker(http: Http) -> Callable[[str], Any]:
    async def check(url: str) -> str:
        await http.get(url, "/health")
        return (await http.get(url, "/model_info"))["weight_version"]

    return check
