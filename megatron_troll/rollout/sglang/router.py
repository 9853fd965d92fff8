"""A sglang-router in front of the servers: requests go to it, weights and checks to the servers."""

import asyncio
from collections.abc import Collection

from megatron_troll.rollout.sglang.errors import ServerFault
from megatron_troll.rollout.sglang.http import Http

JOIN_S = 30.0


class Router:
    """Keeps the router's list of workers."""

    def __init__(self, url: str, http: Http) -> None:
        self.url = url
        self._http = http

    async def keep(self, urls: Collection[str]) -> None:
        """The router is to use just these servers. Raises Passing where it cannot be reached, or does not
        take one in."""
        known = await self._workers()
        for url in known.keys() - set(urls):
            await self._http.delete(self.url, f"/workers/{known[url]}")
        missing = [url for url in urls if url not in known]
        for url in missing:
            await self._http.post(self.url, "/workers", {"url": url, "worker_type": "regular"})
        if missing:
            await self._joined(missing)

    async def _workers(self) -> dict[str, str]:
        """Their ids by URL."""
        reply = await self._http.get(self.url, "/workers")
        try:
            return {worker["url"]: worker["id"] for worker in reply["workers"]}
        except (TypeError, LookupError):
            raise ServerFault(f"{self.url}/workers is not a list of workers: {str(reply)[:200]}") from None

    async def _joined(self, urls: Collection[str]) -> None:
        """The router takes workers in behind its answer."""
        for _ in range(int(JOIN_S / 0.2)):
            if set(urls) <= (await self._workers()).keys():
                return
            await asyncio.sleep(0.2)
        raise ServerFault(f"{self.url} has not taken in {', '.join(urls)} within {JOIN_S:g} s")
