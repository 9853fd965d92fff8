"""Pool of servers: health, circuit breaking, versions; servers come and go while a batch is generated."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

from megatron_troll.config import SGLang
from megatron_troll.rollout.engine import EngineError
from megatron_troll.rollout.sglang.http import Http, NoServers, Passing, ServerFault, Unreachable


class Router:
    """Updates the router's list of workers."""

    def __init__(self, url: str, http: Http) -> None:
        self.url = url
        self._http = http

    async def keep(self, urls: Collection[str]) -> None:
        """Make the router use exactly these servers. Raises Passing if it cannot be reached, or does not add
        one of them."""
        known = await self._workers()
        for url in known.keys() - set(urls):
            await self._http.delete(self.url, f"/workers/{known[url]}")
        missing = [url for url in urls if url not in known]
        for url in missing:
            await self._http.post(self.url, "/workers", {"url": url, "worker_type": "regular"})
        if missing:
            await self._joined(missing)

    async def _workers(self) -> dict[str, str]:
        """Ids of the workers, by URL."""
        reply = await self._http.get(self.url, "/workers")
        try:
            return {worker["url"]: worker["id"] for worker in reply["workers"]}
        except (TypeError, LookupError):
            raise ServerFault(f"{self.url}/workers is not a list of workers: {str(reply)[:200]}") from None

    async def _joined(self, urls: Collection[str]) -> None:
        """Wait until the router has added the workers, which it does after it has answered."""
        for _ in range(int(JOIN_S / 0.2)):
            if set(urls) <= (await self._workers()).keys():
                return
            await asyncio.sleep(0.2)
        raise ServerFault(f"{self.url} has not added {', '.join(urls)} within {JOIN_S:g} s")


POLL_S = 1.0
# Failures in a row after which a server is not used for a while; a single lost connection is enough too.
FAILURES = 3
REST_S = (0.5, 30.0)
# How long to wait for a server with the wanted weights before a sync gives them to the others.
OUT_OF_DATE_S = 5.0

Check = Callable[[str], Awaitable[str]]
CatchUp = Callable[[str, str], Awaitable[None]]


class OutOfDate(EngineError):
    """There are healthy servers, but none with the wanted weights; they need a sync."""


@dataclass
class ServerState:
    """State of one server.

    version   the weights it had at its last check; None: must be checked before it is used
    failures  number of failures in a row
    rests     how many times in a row its use was suspended; it is suspended until `closed_until` (monotonic)
    trouble   why it is not used; `wrong`: the error, if waiting cannot help
    """

    url: str
    under_way: int = 0
    version: str | None = None
    failures: int = 0
    rests: int = 0
    closed_until: float = 0.0
    trouble: str = "not checked yet"
    wrong: EngineError | None = None


class ServerPool:
    """The known servers. `check` returns the weight version of the server at a URL, or raises; `discover`
    lists the current URLs. Belongs to one event loop."""

    def __init__(
        self,
        config: SGLang,
        discover: Callable[[], Sequence[str]],
        check: Check,
        router: Router | None = None,
    ) -> None:
        self._config = config
        self._discover = discover
        self._check = check
        self._router = router
        self._front = None if router is None else ServerState(router.url)
        self._servers: dict[str, ServerState] = {}
        self._changed = asyncio.Condition()
        self._wanted: str | None = None
        self._alone_since: float | None = None
        self.catch_up: CatchUp | None = None

    @property
    def usable(self) -> list[ServerState]:
        """Servers with the wanted weights that are not suspended."""
        if self._wanted is None:
            return []
        now = time.monotonic()
        return [s for s in self._servers.values() if s.version == self._wanted and now >= s.closed_until]

    @property
    def healthy(self) -> list[str]:
        """URLs of the servers that passed their last check, whatever their weights."""
        return [server.url for server in self._servers.values() if server.version is not None]

    async def want(self, version: str | None) -> None:
        """Use only servers with these weights from now on; None: no server."""
        self._wanted = version
        await self.refresh(anew=True)

    async def refresh(self, *, anew: bool = False) -> None:
        """Look for servers, and check the new ones, the failed ones, and, with `anew`, all others."""
        found = self._discover()
        for url in self._servers.keys() - set(found):
            del self._servers[url]
        for url in found:
            self._servers.setdefault(url, ServerState(url))
        now = time.monotonic()
        await asyncio.gather(
            *(
                self._recheck(server)
                for server in list(self._servers.values())
                if anew or (now >= server.closed_until and self._doubtful(server))
            )
        )
        if self._router is not None and self._front is not None:
            await self._check_router(self._router, self._front)
        async with self._changed:
            self._changed.notify_all()

    def _doubtful(self, server: ServerState) -> bool:
        return server.version is None or (self.catch_up is not None and server.version != self._wanted)

    async def _recheck(self, server: ServerState) -> None:
        try:
            server.version = await self._check(server.url)
            if self.catch_up is not None and self._wanted not in (None, server.version):
                await self.catch_up(server.url, self._wanted)
                server.version = await self._check(server.url)
        except Passing as error:
            self._leave_alone(server, error)
        except EngineError as error:
            if server.wrong is None:
                logging.getLogger(__name__).warning("not asking %s: %s", server.url, error)
            server.wrong = error
            self._leave_alone(server, error)
        else:
            server.failures = server.rests = 0
            server.closed_until, server.wrong = 0.0, None
            server.trouble = f"it has weights {server.version}"

    async def _check_router(self, router: Router, front: ServerState) -> None:
        try:
            await router.keep([server.url for server in self.usable])
        except Passing as error:
            self._leave_alone(front, error)
        else:
            front.version = self._wanted

    def _leave_alone(self, server: ServerState, error: EngineError) -> None:
        """Suspend a server, longer each time; failures of requests in flight together count once."""
        now = time.monotonic()
        server.version, server.trouble = None, str(error)
        if now >= server.closed_until:
            server.closed_until = now + min(REST_S[0] * 2**server.rests, REST_S[1])
            server.rests += 1

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Look for servers and check them again and again until the block ends."""

        async def watch() -> None:
            while True:
                await self.refresh()
                await asyncio.sleep(POLL_S)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def ready(self) -> None:
        """Wait until a server is healthy. Raises NoServers, or a server's error if every server is wrong."""
        self._alone_since = None
        while not self.healthy:
            await self.refresh()
            if not self.healthy:
                self._give_up_in_time()
                await asyncio.sleep(POLL_S)
        self._alone_since = None

    async def acquire(self, avoid: str | None = None) -> ServerState:
        """Return the least busy server, other than `avoid` if possible; waits while all are busy, and up to
        `patience_s` if there is none. Give it back with `release`. Raises NoServers, OutOfDate, or a server's
        error if every server is wrong."""
        async with self._changed:
            while True:
                if (chosen := self._choose(avoid)) is not None:
                    chosen.under_way += 1
                    return chosen
                with suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._changed.wait()

    def _choose(self, avoid: str | None) -> ServerState | None:
        usable = self.usable
        if not usable and self._wanted is not None:
            self._give_up_in_time()
            return None
        self._alone_since = None
        limit = self._config.concurrency
        if self._front is not None:
            ready = self._front.version is not None and time.monotonic() >= self._front.closed_until
            usable, limit = [self._front] if ready else [], limit * len(usable)
        free = [server for server in usable if server.under_way < limit]
        preferred = [server for server in free if server.url != avoid] or free
        return min(preferred, key=lambda server: server.under_way, default=None)

    def _give_up_in_time(self) -> None:
        """Raises once there has been no usable server for too long."""
        servers, now = list(self._servers.values()), time.monotonic()
        if servers and all(server.wrong is not None for server in servers):
            assert servers[0].wrong is not None
            raise servers[0].wrong
        self._alone_since = self._alone_since or now
        alone_s = now - self._alone_since
        only_a_sync_helps = self._wanted is not None and self.catch_up is None and bool(self.healthy)
        if only_a_sync_helps and alone_s > OUT_OF_DATE_S:
            raise OutOfDate("no server has the newest weights")
        if alone_s > self._config.patience_s:
            known = "\n".join(f"  {server.url}: {server.trouble}" for server in servers)
            raise NoServers(
                f"no usable server for {self._config.patience_s:g} s (rollout.sglang.patience_s). "
                + (f"What is known:\n{known}" if known else "None is known")
                + "\nStart servers with `mtroll serve`, or name them in rollout.sglang.servers"
            )

    async def release(self, server: ServerState, error: Passing | None = None) -> None:
        """Give a server back after an answer, or after the `error` that came instead."""
        server.under_way -= 1
        if error is None:
            server.failures = 0
        else:
            server.failures += 1
            if isinstance(error, Unreachable) or server.failures >= FAILURES:
                self._leave_alone(server, error)
        async with self._changed:
            self._changed.notify()

    def outdated(self, server: ServerState) -> None:
        """Mark a server that answered with unexpected weights: check it before it is used again."""
        server.version = None


JOIN_S = 30.0
