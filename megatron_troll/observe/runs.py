"""Reading the folders of finished and running runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_troll.observe.run_folder import RunFolder, flatten


class NoMetricsError(RuntimeError):
    """The folder is not a run folder, or its first step is not finished."""


@dataclass(frozen=True)
class RecordedRun:
    """Records of one run. rows: metrics.jsonl, one dict per step; summary: summary.json, empty while the run
    is not finished; config: dotted key -> value."""

    name: str
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]

    def curve(self, field: str) -> tuple[list[int], list[float]]:
        """Steps and values of the rows in which `field` is present and not null."""
        points = [(row["step"], row[field]) for row in self.rows if row.get(field) is not None]
        return [step for step, _ in points], [value for _, value in points]


def read_runs(roots: Sequence[Path]) -> list[RecordedRun]:
    """Read runs, named by folder, or by whole path if two folders share a name. Raises NoMetricsError."""
    names = [root.resolve().name for root in roots]
    unique = len(set(names)) == len(names)
    return [read_run(root, name if unique else str(root)) for root, name in zip(roots, names, strict=True)]


def read_run(root: Path, name: str) -> RecordedRun:
    folder = RunFolder(root)
    rows = read_json_lines(folder.metrics) if folder.metrics.exists() else []
    if not rows:
        raise NoMetricsError(
            f"{root} has no metrics yet: {folder.metrics} "
            f"{'is empty' if folder.metrics.exists() else 'does not exist'}. "
            "It is written after the first step; check the path, or wait."
        )
    summary = json.loads(folder.summary.read_text()) if folder.summary.exists() else {}
    config = yaml.safe_load(folder.config.read_text()) if folder.config.exists() else {}
    return RecordedRun(name, rows, summary, flatten(config))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line without its newline is still being written and is left out."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
    return rows


def differing_keys(runs: Sequence[RecordedRun]) -> dict[str, list[Any]]:
    """Dotted config key -> its value in each run, for the keys that differ between runs."""
    keys = sorted(set().union(*(run.config for run in runs)))
    rows = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def jitter2(series: Sequence[float]) -> float | None:
    """mean |m_{t+2} - 2 m_{t+1} + m_t|, a measure of how unsteady a reward curve is (ALGORITHMS 4.3); None
    for fewer than three points."""
    if len(series) < 3:
        return None
    return float(np.abs(np.diff(np.asarray(series, dtype=np.float64), n=2)).mean())
