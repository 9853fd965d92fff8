"""Writers of a step's metrics: metrics.jsonl always, TensorBoard and W&B if configured."""

import importlib
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from megatron_troll.config import Observe
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.system import naming, write_atomic

PACKAGES = ("torch", "megatron-core", "transformers", "megatron-troll")


class Tracker(Protocol):
    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """Writes one object per step, on disk when `log` returns. NaN and infinities, which JSON lacks, become
    null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "a")  # noqa: SIM115 - held until close

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **row}, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """Writes event files. On a resumed run, the viewer drops earlier records of step `start` or later."""

    def __init__(self, folder: Path, start: int) -> None:
        self._folder = folder
        self._writer = SummaryWriter(str(folder), purge_step=start or None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with naming(self._folder):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run of the same name and id, continued on resume."""

    def __init__(self, project: str, folder: RunFolder, config: Mapping[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        name = folder.root.resolve().name
        self._run = wandb.init(
            project=project, name=name, id=name, resume="allow", dir=str(folder.root), config=dict(config)
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


class Together:
    """Several trackers as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


def open_trackers(folder: RunFolder, observe: Observe, config: Mapping[str, Any], start: int) -> Together:
    """Open every configured tracker, on rank 0. `start` is the first step that will be logged."""
    trackers: list[Tracker] = []
    if observe.wandb_project is not None:
        trackers.append(WandB(observe.wandb_project, folder, config))
    trackers.append(JsonLines(folder.metrics))
    if observe.tensorboard:
        trackers.append(TensorBoard(folder.tensorboard, start))
    return Together(trackers)


@dataclass(frozen=True)
class Summary:
    """Results of a finished run. Success is a share in [0, 1], None if it was not evaluated. remarks: notes
    that a reader of the figures needs."""

    held_out_success_before: float | None
    held_out_success_after: float | None
    seconds: float
    seed: int
    remarks: tuple[str, ...] = ()


def write_summary(path: Path, summary: Summary) -> None:
    """Write summary.json: the summary's fields and `versions` of Python and the packages that produced it."""
    content = asdict(summary) | {"versions": versions()}
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python and the packages that produce the figures."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
