"""Peak memory, and the record that the benchmarks write: figures, machine, versions and date."""

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


# Load of the machine before anything is measured.
LOAD = os.getloadavg()[0]

Record = dict[str, Any]


def record(device: str, rows: Sequence[Record], **more: Any) -> Record:
    """Rows of figures, with the machine, package versions and date of the measurement, and `more` entries."""
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
    """Name of the processor as Linux reports it."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return named[0].split(":")[1].strip() if named else platform.machine()


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def peak_mib(work: Callable[[], object], device: str) -> float:
    """Peak MiB of memory that `work` held, beyond what was held before."""
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
    """Peak of bytes allocated and not yet freed, over the allocations that the profiler saw."""
    results: Any = recorded.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest
