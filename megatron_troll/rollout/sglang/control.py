"""Control of a server: pause it, update its weights, release its memory, read its state."""

import asyncio
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from megatron_troll.rollout.sglang.http import BadReply, Http, Passing, Refused, UpdateRefused, WrongServer
from megatron_troll.weights.buckets import TensorBucket

# Effect on requests in flight: returned with the tokens they have; put back in the server's queue, without
# their caches; or left as they are, including the caches of the old weights.
Pause = Literal["abort", "retract", "in_place"]

MEMORY = ["weights", "kv_cache"]


@dataclass(frozen=True)
class Control:
    """Control requests to servers. `timeout_s` is the limit for each reply."""

    http: Http
    timeout_s: float

    async def pause(self, url: str, mode: Pause) -> None:
        await self._post(url, "/pause_generation", {"mode": mode})

    async def resume(self, url: str) -> None:
        await self._post(url, "/continue_generation", {})

    async def release(self, url: str) -> None:
        """Release the memory of weights and caches; both are lost. Only while no request is in flight."""
        await self._post(url, "/release_memory_occupation", {"tags": MEMORY})

    async def occupy(self, url: str) -> None:
        """Allocate the memory again; it does not contain the weights."""
        await self._post(url, "/resume_memory_occupation", {"tags": MEMORY})

    async def open_update(self, url: str) -> None:
        """Begin a weight update. One that is still open was interrupted, and is closed first."""
        try:
            await self._update(url, "/begin_weight_update", {})
        except UpdateRefused:
            await self.close_update(url)
            await self._update(url, "/begin_weight_update", {})

    async def close_update(self, url: str) -> None:
        await self._update(url, "/end_weight_update", {})

    async def load(self, url: str, folder: str, version: str) -> None:
        """Load all weights from a Hugging Face folder, which the server can read. `load_format` is set for
        servers that were started with random weights (load-format dummy)."""
        body = {
            "model_path": folder,
            "load_format": "safetensors",
            "weight_version": version,
            "flush_cache": True,
        }
        await self._update(url, "/update_weights_from_disk", body)

    async def take_tensors(self, url: str, payload: str, ranks: int) -> None:
        """Load a bucket from shared memory; `ranks` is the number of the server's ranks."""
        body = {
            "serialized_named_tensors": [payload] * ranks,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._update(url, "/update_weights_from_tensor", body)

    async def take_broadcast(self, url: str, group: str, bucket: TensorBucket) -> None:
        """Receive a bucket that rank 0 of `group` broadcasts; the server answers once it has arrived, or at
        once if it refuses."""
        body = {
            "names": [piece.name for piece in bucket.pieces],
            "dtypes": [str(piece.dtype).removeprefix("torch.") for piece in bucket.pieces],
            "shapes": [list(piece.shape) for piece in bucket.pieces],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": False,
        }
        await self._update(url, "/update_weights_from_distributed", body)

    async def join_group(self, url: str, body: dict[str, Any]) -> None:
        await self._update(url, "/init_weights_update_group", body)

    async def leave_group(self, url: str, group: str) -> None:
        await self._update(url, "/destroy_weights_update_group", {"group_name": group})

    async def name_weights(self, url: str, version: str) -> None:
        """Flush the caches of the old weights, and name the new ones `version`."""
        await self._update(url, "/flush_cache", {})
        await self._update(
            url, "/update_weight_version", {"new_version": version, "abort_all_requests": False}
        )

    async def verify(self, url: str, version: str) -> None:
        """Raises WrongServer if the server reports a weight version other than `version`."""
        there = (await self._field(await self.http.get(url, "/model_info"), "weight_version", url)) or None
        if there != version:
            raise WrongServer(
                f"{url} was given weights {version!r} and reports {there!r}: something else "
                "updates it too, or it is not SGLang 0.5.23; restart it"
            )

    async def ranks(self, url: str) -> int:
        """Number of tensor-parallel ranks of the server."""
        return int(await self._field(await self.http.get(url, "/server_info"), "tp_size", url))

    async def checksums(self, url: str) -> dict[str, str]:
        """Hash of each of the server's parameters, by SGLang's names; the hashes of all ranks are joined."""
        reply = await self._post(url, "/weights_checker", {"action": "checksum"})
        sums: dict[str, str] = {}
        for rank in await self._field(reply, "ranks", url):
            for name, value in rank["checksums"].items():
                sums[name] = sums.get(name, "") + value
        return sums

    async def _field(self, reply: Any, name: str, url: str) -> Any:
        if not isinstance(reply, dict) or name not in reply:
            raise BadReply(f"{url} returned no {name}: {str(reply)[:200]}; is it SGLang 0.5.23?")
        return reply[name]

    async def _update(self, url: str, path: str, body: dict[str, Any]) -> None:
        try:
            reply = await self._post(url, path, body)
        except Refused as error:
            raise UpdateRefused(
                f"{error}\nThe server refuses the new weights; it may hold parts of them. Restart it, with a "
                "model of the same shape as the run's, and SGLang 0.5.23"
            ) from error
        if isinstance(reply, dict) and reply.get("success") is False:
            raise UpdateRefused(f"{url}{path}: {reply.get('message')}; restart the server")

    async def _post(self, url: str, path: str, body: dict[str, Any]) -> Any:
        return await self.http.post(url, path, body, self.timeout_s)


async def each(urls: Collection[str], do: Callable[[str], Awaitable[object]]) -> dict[str, Passing]:
    """Run `do(url)` for all URLs at once. Returns the Passing errors, by URL; raises any other error once all
    are done."""
    results = await asyncio.gather(*(do(url) for url in urls), return_exceptions=True)
    failed: dict[str, Passing] = {}
    for url, result in zip(urls, results):
        if isinstance(result, Passing):
            failed[url] = result
        elif isinstance(result, BaseException):
            raise result
    return failed
