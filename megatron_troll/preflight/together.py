"""Checks that need several nodes: a shared file system, clocks, and the network between them."""

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_troll.parallel.groups import Group
from megatron_troll.preflight.finding import Finding, failed, passed
from megatron_troll.system import write_atomic

SEEN_WITHIN_S = 30.0
SKEW_S = 2.0
REDUCED_BYTES = 64 * 2**20
ROUNDS = 5


def shared_folder(world: Group, folder: Path) -> Finding:
    """Check that the other ranks see a file that rank 0 writes and renames. Blocks on all ranks."""
    file = folder / f"preflight-{world.broadcast_object(time.time_ns(), 0)}"
    if world.rank == 0:
        write_atomic(file, "here")
    world.barrier()
    end = time.monotonic() + SEEN_WITHIN_S
    while not file.exists() and time.monotonic() < end:
        time.sleep(0.1)
    seen = file.exists()
    world.barrier()
    if world.rank == 0:
        file.unlink()
    if seen:
        return passed("shared folder", f"{folder}: rank 0's file is seen")
    return failed(
        "shared folder",
        f"{folder}: rank 0's file is not seen here within {SEEN_WITHIN_S:g} s",
        "set `runs` to a file system that every node mounts",
    )


def clock(world: Group) -> Finding:
    """Compare this node's clock with rank 0's after a barrier. Blocks."""
    world.barrier()
    skew = time.time() - world.broadcast_object(time.time(), 0)
    if abs(skew) > SKEW_S:
        return failed("clock", f"{skew:+.1f} s from rank 0's", "synchronise the clocks (chrony)")
    return passed("clock", f"within {SKEW_S:g} s of rank 0's")


def all_reduce(world: Group, device: torch.device, interface: str) -> Iterator[Finding]:
    """Sum `REDUCED_BYTES` over all ranks, and report the bus bandwidth (2 (n - 1) / n of the bytes, over the
    time). Blocks on all ranks."""
    if world.size == 1:
        return
    ones = torch.ones(REDUCED_BYTES // 4, device=device)
    world.all_reduce(ones)
    right = bool((ones == world.size).all())
    began = time.perf_counter()
    for _ in range(ROUNDS):
        world.all_reduce(ones.fill_(1.0))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - began) / ROUNDS
    rate = 2 * (world.size - 1) / world.size * REDUCED_BYTES / seconds / 1e9
    text = f"{world.size} ranks, {rate:.2f} GB/s over {interface}"
    if not right:
        yield failed("all-reduce", f"{text}: a wrong sum", "memory or network of a node is at fault")
    elif world.rank == 0:
        yield passed("all-reduce", text)
