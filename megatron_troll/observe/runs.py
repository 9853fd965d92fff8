"""Reading the folders of finished and running runs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_troll.config import ConfigError
from megatron_troll.config.load import parse_file
from megatron_troll.observe.run_folder import RunFolder, RunFolderError, flatten


class NoMetricsError(RunFolderError):
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
    if root.exists() and not root.is_dir():
        raise NoMetricsError(f"{root} is a file, expected a run folder")
    rows = read_json_lines(folder.metrics) if folder.metrics.exists() else []
    if not rows:
        raise NoMetricsError(
            f"{root} has no metrics yet: {folder.metrics} "
            f"{'is empty' if folder.metrics.exists() else 'does not exist'}. "
            "It is written after the first step; check the path, or wait."
        )
    return RecordedRun(name, rows, read_summary(folder.summary), read_config(folder.config))


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json; empty if there is none yet. Raises RunFolderError if it is damaged."""
    if not path.exists():
        return {}
    summary = _json_object(_text_of(path), str(path))
    for key in ("held_out_success_before", "held_out_success_after", "seconds", "seed"):
        if not _is_number(summary.get(key)):
            raise RunFolderError(f"{path}: {key!r} is no number: {summary[key]!r:.60}")
    versions = summary.get("versions", {})
    if not isinstance(versions, dict):
        raise RunFolderError(f"{path}: 'versions' is no object: {versions!r:.60}")
    return summary


def read_config(path: Path) -> dict[str, Any]:
    """Dotted key -> value of a run's config.yaml; empty if there is none. Raises RunFolderError."""
    if not path.exists():
        return {}
    if not path.is_file():
        raise RunFolderError(f"{path}: not a file")
    try:
        return flatten(parse_file(path).plain())
    except ConfigError as error:
        raise RunFolderError(f"damaged run folder: {error}") from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a last line without its newline is still being written and is left out. Raises
    RunFolderError for a line that is no row of metrics."""
    rows = []
    # Not splitlines: it also splits at separators that JSON text may hold.
    for number, line in enumerate(_text_of(path).split("\n")[:-1], start=1):
        row = _json_object(line, f"{path}, line {number}")
        if type(row.get("step")) is not int:
            raise RunFolderError(f"{path}, line {number}: 'step' is no integer: {row.get('step')!r:.60}")
        for key, value in row.items():
            if not _is_number(value):
                raise RunFolderError(f"{path}, line {number}: {key!r:.60} is no number: {value!r:.60}")
        rows.append(row)
    return rows


def _is_number(value: Any) -> bool:
    """Whether a value is null or a number that can be drawn."""
    return value is None or isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise RunFolderError(f"{path}: not a file")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"{path}: cannot be read: {error}") from error


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{where}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, deep nesting
        raise RunFolderError(f"{where}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise RunFolderError(f"{where}: expected an object, got {type(value).__name__}")
    return value


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
