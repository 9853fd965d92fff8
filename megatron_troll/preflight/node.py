"""What a node has: GPUs and their memory, disk, ports, addresses."""

import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_troll.preflight.finding import Finding, failed, passed

GIB = 2**30


def gpus(wanted: int, bytes_each: int) -> Iterator[Finding]:
    """`wanted` GPUs of `bytes_each`; 0: none are asked for."""
    count = torch.cuda.device_count()
    if count < wanted:
        yield failed("gpus", f"{count}, of {wanted} asked for", "ask Slurm for them: --gpus-per-node")
        return
    yield passed("gpus", ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)})) or "none")
    for index in range(wanted):
        free, whole = torch.cuda.mem_get_info(index)
        if free < bytes_each:
            yield failed(
                "gpu memory",
                f"GPU {index}: {free / GIB:.1f} of {whole / GIB:.1f} GiB free, {bytes_each / GIB:.1f} planned",
                "another process holds it, or the layout is too small: mtroll plan",
            )
            return
    if wanted:
        yield passed("gpu memory", f"{bytes_each / GIB:.1f} GiB planned, free on each")


def disk(folder: Path, wanted: int) -> Finding:
    """Space for what a run keeps, where it keeps it."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / GIB:.1f} GiB free at {there}, {wanted / GIB:.1f} needed"
    if free < wanted:
        return failed("disk", text, "free some, lower checkpoint.keep_last, or set `runs` to another disk")
    return passed("disk", text)


def names() -> Finding:
    """Whether this node can look up its own name, which some libraries need."""
    name = socket.gethostname()
    try:
        return passed("name", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return failed("name", f"{name} cannot be resolved: {error}", "add it to DNS or /etc/hosts")


def ports(wanted: Sequence[int]) -> Finding:
    """TCP ports that servers will listen on."""
    taken = [port for port in wanted if _taken(port)]
    if taken:
        return failed("ports", f"{', '.join(map(str, taken))} taken", "stop what listens there (ss -ltnp)")
    return passed("ports", f"{len(wanted)} free" if wanted else "none needed")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return True
        return False
