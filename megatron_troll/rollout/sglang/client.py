"""Client for many requests to servers that may be slow, die, or get new weights meanwhile."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_troll.config import SGLang
from megatron_troll.rollout.engine import Completion, EngineError
from megatron_troll.rollout.sglang.control import each
from megatron_troll.rollout.sglang.http import BadReply, Http, Passing, Refused, ServerFault, Unreachable
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

# Time limit for a server to return the partial answer of a request that was aborted as too slow.
ABORT_S = 10.0
BACKOFF_S = (0.1, 5.0)


@dataclass(frozen=True)
class NamedRequest:
    """A request; error messages refer to it by `name`."""

    name: str
    ask: GenerationRequest


class Client:
    """Sends requests to `servers`, on their event loop. `progress` is called after each reply."""

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

    async def generate(
        self, questions: Sequence[NamedRequest], answered: Callable[[int, Completion], object]
    ) -> None:
        """Get one answer to every question; `answered(i, answer)` is called as they arrive. The tokens of an
        aborted answer are kept, and any server may continue it. Raises the first EngineError that a retry
        cannot fix, and cancels the requests in flight."""

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
        """Score every sequence on every server at `urls`: top-K distributions [n - 1, top_k] after each of
        its n tokens but the last, at temperature 1. Servers that fail `attempts` times are left out; if all
        fail, raises the error of the first one."""
        found: dict[str, list[TokenTopK]] = {}

        async def scores(url: str, ids: Sequence[int]) -> TokenTopK:
            async for attempt in self._attempts():
                with attempt:
                    limit = self._config.deadline_s
                    reply = await self._http.post(url, "/generate", score_body(ids, top_k), limit)
                    return score_of(reply, len(ids), top_k, vocab)
            raise AssertionError("tenacity returns or raises")

        async def one(url: str) -> None:
            found[url] = await asyncio.gather(*(scores(url, ids) for ids in sequences))

        failed = await each(urls, one)
        if not found:
            raise next(iter(failed.values()))
        return found

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
        """Get a part from any server, in up to `attempts` attempts, with the versions of its tokens."""
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
            named = type(found)(f"sample {question.name}, {server.url}: {found}")
            error = named if isinstance(named, Passing) else None
            raise named from found
        finally:
            await self._servers.release(server, error)

    async def _reply(self, question: NamedRequest, server: ServerState) -> tuple[object, bool]:
        """The reply, and whether it came only after an abort at `deadline_s`."""
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
        """Abort a request; behind a router, at every server: only the router knows which one has it."""
        urls = self._servers.healthy if server.url == self._config.router else [server.url]
        with suppress(Passing, Refused):
            await asyncio.gather(*(self._http.post(url, "/abort_request", {"rid": rid}) for url in urls))

    def _numbered(self, part: Part, server: ServerState) -> np.ndarray:
        """[T] int32, version of the weights of each token. Raises BadReply if they are not from this run."""
        versions = np.empty(len(part.ids), dtype=np.int32)
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
    """The request for the tokens that are still missing after `parts`."""
    drawn = [int(token) for part in parts for token in part.ids]
    return replace(ask, ids=[*ask.ids, *drawn], max_tokens=ask.max_tokens - len(drawn))


def _joined(parts: Sequence[tuple[Part, np.ndarray]]) -> Completion:
    """Join the parts of an answer. An abort after the last requested token counts as finish "length"."""
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
