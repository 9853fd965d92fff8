"""An event loop in a thread of its own, so that questions are asked while this thread does something else."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Work = Coroutine[Any, Any, T]


class Background:
    """Runs until `close`. `wait` is called about every second while something is waited for."""

    def __init__(self, wait: Callable[[], object] = lambda: None) -> None:
        self._wait = wait
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()

    def start(self, work: Work[T]) -> "Future[T]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Work[T]) -> T:
        """The result of `work`, which is cancelled where this thread is interrupted meanwhile."""
        return self.result(self.start(work))

    def result(self, future: "Future[T]") -> T:
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
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
