"""Rewinding a run folder to a checkpoint's step: later records are moved aside, never deleted."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_troll.observe.rollouts import step_of
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.system import write_atomic


@dataclass(frozen=True)
class Rewound:
    """later: rows of later steps that were moved, a last line that a kill cut included; damaged: other lines
    that were moved, because they are no rows or repeat a step; missing: steps without a row, ascending."""

    later: int = 0
    damaged: int = 0
    missing: tuple[int, ...] = ()

    def remarks(self, folder: RunFolder) -> tuple[str, ...]:
        """One sentence for each loss, for the terminal and the summary of the run."""
        said = []
        if self.damaged:
            said.append(
                f"{self.damaged} lines of {folder.metrics.name} are damaged; they are now in "
                f"{folder.discarded_metrics.name}"
            )
        if self.missing:
            said.append(
                f"{folder.metrics.name} has lost the rows of steps {ranges(self.missing)}: curves lack them"
            )
        return tuple(said)


def rewind(folder: RunFolder, step: int) -> Rewound:
    """Make the folder end at `step`, for a run that continues from that step's checkpoint; -1: at nothing.

    Later lines of metrics.jsonl, a last line cut by a kill, and lines that are no rows or repeat one are
    appended to metrics.discarded.jsonl; later rollout files move to rollouts/discarded/.
    """
    for path in sorted(folder.rollouts.glob("step_*.jsonl.gz")):
        if (number := step_of(path)) is not None and number > step:
            aside = folder.rollouts / "discarded" / path.name
            aside.parent.mkdir(exist_ok=True)
            os.replace(path, aside)
    content = folder.metrics.read_bytes() if folder.metrics.exists() else b""
    rows: dict[int, bytes] = {}
    aside, later = [], 0
    for line in content.splitlines(keepends=True):
        number = line_step(line)
        if number is not None and number <= step and number not in rows:
            rows[number] = line
            continue
        aside.append(line.rstrip(b"\n") + b"\n")
        later += number is not None and number > step
    later += bool(content) and not content.endswith(b"\n")
    if aside:
        with open(folder.discarded_metrics, "ab") as file:
            file.writelines(aside)
            file.flush()
            os.fsync(file.fileno())
    kept = b"".join(rows[number] for number in sorted(rows))
    if kept != content:
        write_atomic(folder.metrics, kept)
    missing = tuple(number for number in range(step + 1) if number not in rows)
    return Rewound(later, len(aside) - later, missing)


def line_step(line: bytes) -> int | None:
    """The step of a row of metrics.jsonl; None if the line is cut short or is no row."""
    try:
        row = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def ranges(steps: Iterable[int]) -> str:
    """Ascending numbers in words: "0, 3-5, 9"."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and runs[-1][1] == step - 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
