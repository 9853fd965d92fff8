"""Transfer of a stream of tensors to servers. Runs on rank 0 only; the stream itself runs on all ranks."""

import asyncio
import base64
import io
import os
import shutil
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Protocol

import torch
import torch.multiprocessing
from torch import Tensor

from megatron_troll.rollout.sglang.background import Background
from megatron_troll.rollout.sglang.control import Control, each
from megatron_troll.rollout.sglang.http import Passing
from megatron_troll.weights.buckets import TensorBucket, allocated, buckets
from megatron_troll.weights.folder import FolderWriter

Tensors = Iterator[tuple[str, Tensor]]
Failed = dict[str, Passing]
# File in a folder of weights with the name of the run that wrote it: two runs may share a folder.
WRITTEN_BY = "written_by"


class Transport(Protocol):
    """Sends the tensors of a stream to servers."""

    def deliver(self, tensors: Tensors, urls: Sequence[str], version: str) -> Failed:
        """Send all tensors to every server at `urls`; returns the servers that were lost, all others have
        them. The servers are paused. Raises UpdateRefused, and Passing if none has them. Blocks."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Disk:
    """Hugging Face folders under `folder`, which the servers can read. Only the newest one that `run` wrote
    is kept; all else in `folder`, such as the weights of other runs, is left alone."""

    background: Background
    control: Control
    folder: Path
    source_folder: Path
    max_bytes: int
    run: str

    def deliver(self, tensors: Tensors, urls: Sequence[str], version: str) -> Failed:
        target = self.place(version)
        with FolderWriter(target, self.source_folder, self.max_bytes) as writer:
            (writer.part / WRITTEN_BY).write_text(f"{self.run}\n")
            for name, tensor in tensors:
                writer.add(name, tensor)
        failed = self.background.run(each(urls, lambda url: self.control.load(url, str(target), version)))
        for old in self.folder.iterdir():
            if old != target and self._wrote(old):
                shutil.rmtree(old)
        return failed

    def _wrote(self, folder: Path) -> bool:
        """Whether this run, or an earlier start of it, wrote `folder`, maybe not to its end."""
        written_by = folder / WRITTEN_BY
        if folder.is_symlink() or not written_by.is_file():
            return False
        return written_by.read_bytes() == f"{self.run}\n".encode()

    def place(self, version: str) -> Path:
        return self.folder.absolute() / version

    async def catch_up(self, url: str, version: str) -> None:
        """Give the weights of the last sync to a server that joined later."""
        await self.control.load(url, str(self.place(version)), version)

    def close(self) -> None:
        pass


@contextmanager
def _by_file_name() -> Iterator[None]:
    """Share memory by file name: a file descriptor cannot be sent over HTTP."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


def shared(size: int, device: torch.device) -> Tensor:
    """Memory that servers can map, [size] uint8. Sharing a bucket only after it is filled would hold it
    twice, and `share_memory_` would write every page of one that is filled in part."""
    if device.type != "cpu":
        return allocated(size, device)
    with _by_file_name():
        storage = torch.UntypedStorage._new_shared(size, device=device.type)
    return torch.empty(0, dtype=torch.uint8).set_(storage)


@dataclass(frozen=True)
class Shared:
    """Buckets in memory that the servers map: shared memory between processes of one machine on CPU, CUDA IPC
    on GPUs."""

    background: Background
    control: Control
    max_bytes: int

    def __post_init__(self) -> None:
        _start_sharing()

    def deliver(self, tensors: Tensors, urls: Sequence[str], version: str) -> Failed:
        ranks = {url: self.background.run(self.control.ranks(url)) for url in urls}
        failed: Failed = {}

        async def send(bucket: TensorBucket) -> None:
            payload = shared_payload(bucket)
            there = [url for url in urls if url not in failed]
            failed.update(await each(there, lambda url: self.control.take_tensors(url, payload, ranks[url])))

        return in_session(self, buckets(tensors, self.max_bytes, shared), urls, send, failed)

    def close(self) -> None:
        pass


def _start_sharing() -> None:
    """Start torch's manager of shared memory with /dev/null as stderr. It lives as long as any server that
    has mapped memory, and must not hold this process's stderr open, for which a terminal or a pipe waits."""
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with _by_file_name():
            torch.zeros(1).share_memory_()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def shared_payload(bucket: TensorBucket) -> str:
    """Handle and layout of the bucket's memory in the form that SGLang unpickles: base64 text of some hundred
    bytes per tensor. The sender owns the memory and must keep it until the server has answered."""
    pieces = [
        SimpleNamespace(
            name=piece.name,
            shape=piece.shape,
            dtype=piece.dtype,
            start_idx=piece.start,
            end_idx=piece.end,
            numel=piece.end - piece.start,
        )
        for piece in bucket.pieces
    ]
    buffer = io.BytesIO()
    with _by_file_name():
        ForkingPickler(buffer).dump({"flattened_tensor": bucket.flat, "metadata": pieces})
    return base64.b64encode(buffer.getvalue()).decode()


class Bucketed(Protocol):
    """Attributes that sending bucket by bucket needs."""

    @property
    def background(self) -> Background: ...
    @property
    def control(self) -> Control: ...


def in_session(
    way: Bucketed,
    filled: Iterator[TensorBucket],
    urls: Sequence[str],
    send: Callable[[TensorBucket], Awaitable[None]],
    failed: Failed,
) -> Failed:
    """Open an update, send it bucket by bucket and close it; the next bucket is filled while one is sent.
    `send` may add the servers that it loses to `failed`."""
    run = way.background.run
    failed.update(run(each(urls, way.control.open_update)))
    under_way: Future[None] | None = None
    for bucket in filled:
        if under_way is not None:
            way.background.result(under_way)
        if bucket.flat.is_cuda:
            torch.cuda.synchronize(bucket.flat.device)
        under_way = way.background.start(_awaited(send, bucket))
    if under_way is not None:
        way.background.result(under_way)
    left = [url for url in urls if url not in failed]
    failed.update(run(each(left, way.control.close_update)))
    return failed


async def _awaited(send: Callable[[TensorBucket], Awaitable[None]], bucket: TensorBucket) -> None:
    await send(bucket)


async def quietly(urls: Sequence[str], do: Callable[[str], Awaitable[object]]) -> None:
    """Run `do` for all servers and ignore errors: after a failure, servers may be in any state."""
    await asyncio.gather(*(do(url) for url in urls), return_exceptions=True)
