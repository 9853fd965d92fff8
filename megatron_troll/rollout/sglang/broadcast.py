"""Weight transfer by broadcast: rank 0 of the trainer and every server rank are in one process group."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from megatron_troll.parallel.groups import store_at
from megatron_troll.rollout.engine import EngineError
from megatron_troll.rollout.sglang.background import Background
from megatron_troll.rollout.sglang.control import Control
from megatron_troll.rollout.sglang.http import Unreachable
from megatron_troll.rollout.sglang.transport import Failed, Tensors, in_session, quietly
from megatron_troll.weights.buckets import TensorBucket, buckets

POLL_S = 0.001
# Time limit for forming a group, and for one bucket.
PATIENCE = timedelta(seconds=120)


@dataclass(frozen=True)
class Joined:
    """A process group of this process, as rank 0, and the servers `urls`."""

    name: str
    urls: tuple[str, ...]
    handle: dist.ProcessGroup
    store: dist.TCPStore


@dataclass
class Broadcast:
    """Broadcasts weights to servers. The group is made at the first sync and again whenever the servers have
    changed; losing a server meanwhile breaks it for all. Servers reach this process at `address`."""

    background: Background
    control: Control
    max_bytes: int
    address: str
    run: str
    backend: str
    _group: Joined | None = None
    _numbers: "itertools.count[int]" = field(default_factory=itertools.count)

    def deliver(self, tensors: Tensors, urls: Sequence[str], version: str) -> Failed:
        try:
            group = self._joined(tuple(urls))

            async def send(bucket: TensorBucket) -> None:
                await self._send(group, bucket)

            return in_session(self, buckets(tensors, self.max_bytes), urls, send, {})
        except BaseException:
            self.close()
            raise

    async def _send(self, group: Joined, bucket: TensorBucket) -> None:
        """Broadcast a bucket. A server that answers before it is complete has refused it: raise its error."""
        asked = [
            asyncio.create_task(self.control.take_broadcast(url, group.name, bucket)) for url in group.urls
        ]
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        work = group.handle.broadcast([bucket.flat], options)
        try:
            while not work.is_completed():
                for task in asked:
                    if task.done():
                        task.result()
                await asyncio.sleep(POLL_S)
            work.wait()
            await asyncio.gather(*asked)
        except EngineError:
            raise
        except RuntimeError as error:
            raise Unreachable(f"the broadcast to {', '.join(group.urls)} was interrupted: {error}") from error
        finally:
            for task in asked:
                task.cancel()

    def _joined(self, urls: tuple[str, ...]) -> Joined:
        if self._group is not None and self._group.urls != urls:
            self.close()
        if self._group is None:
            self._group = self.background.run(self._join(urls))
        return self._group

    async def _join(self, urls: tuple[str, ...]) -> Joined:
        """Join the group together with every server. Raises the first error that a server returns."""
        ranks = await asyncio.gather(*(self.control.ranks(url) for url in urls))
        first = dict(zip(urls, itertools.accumulate((1, *ranks[:-1]))))
        world, name = 1 + sum(ranks), f"{self.run}-{next(self._numbers)}"
        store = store_at(self.address, 0, world, PATIENCE)

        async def join(url: str) -> None:
            await self.control.join_group(
                url,
                {
                    "master_address": self.address,
                    "master_port": store.port,
                    "rank_offset": first[url],
                    "world_size": world,
                    "group_name": name,
                    "backend": self.backend,
                },
            )

        mine = asyncio.create_task(asyncio.to_thread(_form, name, world, self.backend, store))
        await asyncio.gather(*(join(url) for url in urls))
        try:
            return Joined(name, urls, await mine, store)
        except RuntimeError as error:
            raise Unreachable(f"no process group with {', '.join(urls)}: {error}") from error

    def close(self) -> None:
        """Leave the group, and make the servers leave it."""
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group.handle)
            self.background.run(quietly(group.urls, lambda url: self.control.leave_group(url, group.name)))


def _form(name: str, world: int, backend: str, store: dist.TCPStore) -> dist.ProcessGroup:
    """Create the group outside of this process's own world, for which torch has no public call. SGLang does
    the same on its side, and both must use the same names for the store's keys."""
    handle, _ = c10d._new_process_group_helper(
        world,
        0,
        [],
        backend,
        dist.PrefixStore(name, store),
        group_name=c10d.GroupName(name),
        timeout=PATIENCE,
    )
    assert isinstance(handle, dist.ProcessGroup)
    c10d._world.pg_group_ranks[handle] = {rank: rank for rank in range(world)}
    return handle


def backend_for(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
