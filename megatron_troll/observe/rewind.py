"""Rewinding a run folder to a checkpoint's step: later records are moved aside, never deleted."""

import json
import os

from megatron_troll.observe.rollouts import step_of
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.system import write_atomic


def rewind(folder: RunFolder, step: int) -> int:
    """Make the folder end at `step`, for a run that continues from that step's checkpoint.

    Later lines of metrics.jsonl, and a last line cut by a kill, are appended to metrics.discarded.jsonl;
    later rollout files move to rollouts/discarded/. Returns the number of metrics lines moved.
    """
    for path in sorted(folder.rollouts.glob("step_*.jsonl.gz")):
        if step_of(path) > step:
            aside = folder.rollouts / "discarded" / path.name
            aside.parent.mkdir(exist_ok=True)
            os.replace(path, aside)
    if not folder.metrics.exists():
        return 0
    lines = folder.metrics.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line_step(line) <= step]
    later = [line.rstrip("\n") + "\n" for line in lines if line_step(line) > step]
    if later:
        with open(folder.discarded_metrics, "a") as file:
            file.writelines(later)
            file.flush()
            os.fsync(file.fileno())
        write_atomic(folder.metrics, "".join(kept))
    return len(later)


def line_step(line: str) -> float:
    """The step of a metrics line; infinity for a line that a kill cut short."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except json.JSONDecodeError:
        return float("inf")
