"""Answers to many questions from servers that may be slow, die, or be given new weights meanwhile."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_troll.config.tree import SGLang
from megatron_troll.rollout.engine import Completion, EngineError
from megatron_troll.rollout.sglang.control import each
from megatron_troll.rollout.sglang.errors import BadReply, Passing, Refused, ServerFault, Unreachable
from megatron_troll.rollout.sglang.http import Http
from megatron_troll.rollout.sglang.servers import ServerPool, ServerState
from megatron_troll.rollout.sglang.wire import (
    GenerationRequest,
    Part,
    Versions,
    continued,
    part_of,
    score_body,
    score_of,
)
from megatron_troll.types import TokenTopK

# How long a server may take to hand over what it has of an answer that takes too long.
ABORT_S = 10.0
BACKOFF_S = (0.1, 5.0)


@dataclass(frozen=True)
class NamedRequest:
    """`name` is what errors call it."""

    name: str
    ask: GenerationRequest


class Client:
    """Asks `servers`; belongs to their event loop. `progress` is called after each reply."""

    def __init__(
        self,
        config: SGLang,
        http: Http,
        servers: ServerPool,
        versions: Versions,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._config = config
        self._http = http
        self._servers = servers
        self._versions = versions
        self._progress = progress
        self._numbers = itertools.count()

    async def draw(
        self, questions: Sequence[NamedRequest], answered: Callable[[int, Completion], object]
    ) -> None:
        """Every question answered once; `answered(i, answer)` is called as they come. What a server had of an
        answer when it was aborted is kept, and continued anywhere. Raises the first EngineError that no other
        attempt can mend; what is then under way is given up."""

        async def one(i: int) -> None:
            answered(i, await self._answer(questions[i]))

        async with self._servers.watched():
            tasks = [asyncio.create_task(one(i)) for i in range(len(questions))]
            try:
                for task in asyncio.as_completed(tasks):
                    await task
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def score(
        self, urls: Sequence[str], sequences: Sequence[Sequence[int]], top_k: int, vocab: int
    ) -> dict[str, list[TokenTopK]]:
        """What every server at `urls` makes of every sequence: the law [n - 1, top_k] after each of its n
        tokens but the last, of temperature 1. Servers that cannot be asked, tried `attempts` times, are left
        out; raises what the first one says where none can."""
        laws: dict[str, list[TokenTopK]] = {}

        async def law(url: str, ids: Sequence[int]) -> TokenTopK:
            async for attempt in self._attempts():
                with attempt:
                    limit = self._config.deadline_s
                    reply = await self._http.post(url, "/generate", score_body(ids, top_k), limit)
                    return score_of(reply, len(ids), top_k, vocab)
            raise AssertionError("tenacity returns or raises")

        async def one(url: str) -> None:
            laws[url] = await asyncio.gather(*(law(url, ids) for ids in sequences))

        failed = await each(urls, one)
        if not laws:
            raise next(iter(failed.values()))
        return laws

    def _attempts(self) -> AsyncRetrying:
        return AsyncRetrying(
            retry=retry_if_exception_type(Passing),
            stop=stop_after_attempt(self._config.attempts),
            wait=wait_random_exponential(multiplier=BACKOFF_S[0], max=BACKOFF_S[1]),
            reraise=True,
        )

    async def _answer(self, question: NamedRequest) -> Completion:
        parts: list[tuple[Part, np.ndarray]] = []
        fruitless = 0
        while not parts or parts[-1][0].finish == "abort":
            rest = _rest(question.ask, [part for part, _ in parts])
            if rest.max_tokens == 0:
                break
            part = await self._part(replace(question, ask=rest))
            parts.append(part)
            fruitless = 0 if len(part[0].ids) else fruitless + 1
            if fruitless == self._config.attempts:
                raise ServerFault(f"sample {question.name}: aborted {fruitless} times before a first token")
        return _joined(parts)

    async def _part(self, question: NamedRequest) -> tuple[Part, np.ndarray]:
        """From whichever server gives one, tried `attempts` times, with the versions of its tokens."""
        failed: ServerState | None = None
        async for attempt in self._attempts():
            with attempt:
                server = await self._servers.acquire(avoid=failed and failed.url)
                failed = server
                return await self._attempt(question, server)
        raise AssertionError("tenacity returns or raises")

    async def _attempt(self, question: NamedRequest, server: ServerState) -> tuple[Part, np.ndarray]:
        error: Passing | None = None
        try:
            reply, slow = await self._reply(question, server)
            part = part_of(reply, question.ask)
            self._progress()
            if slow:
                error = Unreachable(f"{server.url}: no answer within {self._config.deadline_s:g} s")
            return part, self._numbered(part, server)
        except EngineError as found:
            told = type(found)(f"sample {question.name}, {server.url}: {found}")
            error = told if isinstance(told, Passing) else None
            raise told from found
        finally:
            await self._servers.release(server, error)

    async def _reply(self, question: NamedRequest, server: ServerState) -> tuple[object, bool]:
        """The reply, and whether it had to be asked for before it was done."""
        rid = f"{self._versions.run}-{next(self._numbers)}-"
        asked = asyncio.create_task(
            self._http.post(server.url, "/generate", question.ask.body(rid), timeout=None)
        )
        try:
            done, _ = await asyncio.wait({asked}, timeout=self._config.deadline_s)
            if done:
                return asked.result(), False
            aborting = asyncio.create_task(self._abort(rid, server))
            done, _ = await asyncio.wait({asked}, timeout=ABORT_S)
            aborting.cancel()
            if done:
                return asked.result(), True
            raise Unreachable(f"no answer within {self._config.deadline_s:g} s (rollout.sglang.deadline_s)")
        finally:
            asked.cancel()

    async def _abort(self, rid: str, server: ServerState) -> None:
        """At every server: only a router knows which one it asked."""
        urls = self._servers.healthy if server.url == self._config.router else [server.url]
        with suppress(Passing, Refused):
            await asyncio.gather(*(self._http.post(url, "/abort_request", {"rid": rid}) for url in urls))

    def _numbered(self, part: Part, server: ServerState) -> np.ndarray:
        """[T] int64, the weights of each token. Raises BadReply where this run did not put them there."""
        versions = np.empty(len(part.ids), dtype=np.int64)
        for span in part.spans:
            number = self._versions.number(span.version)
            if span.end > span.start and number is None:
                self._servers.outdated(server)
                raise BadReply(
                    f"tokens from weights {span.version!r}, which this run did not put there: the server was "
                    "restarted, or another run writes to it too"
                )
            versions[span.start : span.end] = -1 if number is None else number
        return versions


def _rest(ask: GenerationRequest, parts: Sequence[Part]) -> GenerationRequest:
    """What is still to be drawn after `parts`."""
    drawn = [int(token) for part in parts for token in part.ids]
    return replace(ask, ids=[*ask.ids, *drawn], max_tokens=ask.max_tokens - len(drawn))


def _joined(parts: Sequence[tuple[Part, np.ndarray]]) -> Completion:
    """The whole answer. One that an abort cut after its last token has the length that was asked for."""
    records = [part.topk for part, _ in parts if part.topk is not None]
    finish = parts[-1][0].finish
    return Completion(
        ids=np.concatenate([part.ids for part, _ in parts]),
        logp=np.concatenate([part.logp for part, _ in parts]),
        topk=_stacked(records) if records else None,
        versions=np.concatenate([versions for _, versions in parts]),
        finish="length" if finish == "abort" else finish,
        experts=continued([part.experts for part, _ in parts if part.experts is not None]),
    )


def _stacked(records: Sequence[TokenTopK]) -> TokenTopK:
    return TokenTopK(
        np.concatenate([record.ids for record in records]),
        np.concatenate([record.logp for record in records]),
    )
