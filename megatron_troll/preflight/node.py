"""Checks of a node's GPUs, disk and name."""

import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_troll.preflight.finding import Finding, failed, passed

GIB = 2**30


def gpus(wanted: int) -> Finding:
    """Check the number of GPUs of this node; `wanted` 0: none are required."""
    count = torch.cuda.device_count()
    if count < wanted:
        return failed("gpus", f"{count}, of {wanted} asked for", "ask Slurm for them: --gpus-per-node")
    return passed("gpus", ", ".join(sorted({torch.cuda.get_device_name(i) for i in range(count)})) or "none")


def free_memory() -> list[int]:
    """Free bytes of each GPU of this node."""
    return [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]


def gpu_memory(free: Sequence[int], wanted: int) -> Iterator[Finding]:
    """Compare the free memory of the fullest GPU with the plan; yields nothing without GPUs."""
    if not free:
        return
    least = min(range(len(free)), key=free.__getitem__)
    text = f"{free[least] / GIB:.1f} GiB free on GPU {least}, {wanted / GIB:.1f} planned"
    if free[least] < wanted:
        advice = "end other processes on it, or reduce the run as `mtroll plan` advises"
        yield failed("gpu memory", text, advice)
    else:
        yield passed("gpu memory", text)


def disk(folder: Path, wanted: int) -> Finding:
    """Check the free disk space at the run's folder."""
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
