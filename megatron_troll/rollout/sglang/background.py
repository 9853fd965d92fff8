"""An event loop in a thread of its own, so that requests are sent while the caller does something else."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

type Work[T] = Coroutine[Any, Any, T]


class Background:
    """Runs until `close`. `wait` is called about every second while a result is waited for."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self._wait = wait
        self._under_way: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()

    def start[T](self, work: Work[T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(self._noted(work), self._loop)

    async def _noted[T](self, work: Work[T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._under_way.add(task)
        try:
            return await work
        finally:
            self._under_way.discard(task)

    def run[T](self, work: Work[T]) -> T:
        """Return the result of `work`, which is cancelled if this thread is interrupted meanwhile."""
        return self.result(self.start(work))

    def result[T](self, future: "Future[T]") -> T:
        try:
            while True:
                try:
                    return future.result(timeout=1.0)
                except TimeoutError:
                    if future.done():
                        raise
                self._wait()
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel the work in flight and stop the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        under_way = list(self._under_way)
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)
