"""What the benchmarks measure besides time, and what they write down."""

import json
import os
import platform
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PACKAGES = ("torch", "triton", "megatron-core", "liger-kernel")


# Of the machine, before anything is measured.
LOAD = os.getloadavg()[0]

Record = dict[str, Any]


def record(device: str, rows: Sequence[Record], **more: Any) -> Record:
    """Rows of figures with where, with what and when they were measured, and `more` of them."""
    name = torch.cuda.get_device_name() if device == "cuda" else processor()
    return {
        "machine": {"device": name, "threads": torch.get_num_threads(), "load_before": LOAD},
        "versions": {package: version(package) for package in PACKAGES if installed(package)},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **more,
        "rows": list(rows),
    }


def write(path: Path, found: Record) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def processor() -> str:
    """As Linux names it."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return named[0].split(":")[1].strip() if named else platform.machine()


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def peak_mib(work: Callable[[], object], device: str) -> float:
    """The most memory that `work` held beyond what was there before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    return _highest(recorded) / 2**20


def _highest(recorded: profile) -> int:
    """The most bytes that were allocated and not freed, of the allocations that the profiler saw."""
    results: Any = recorded.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
