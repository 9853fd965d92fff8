"""A checkpoint without weights: everything that is checked before a model is built."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_troll.mcore.checkpoint_folder import BACKENDS, TENSORS, draft, path_of, publish

COUNTERS = {"optimizer_steps": 4, "schedule_steps": 4}


def manifest(step: int) -> dict[str, Any]:
    """The manifest of a checkpoint, except for what `publish` adds."""
    return {
        "step": step,
        "score": None,
        "layouts": {"world": 1, "models": {"policy": {"tp": 1}}},
        "models": {"policy": {"shape": {"hidden": 8}, "optimizer": "adamw", "counters": COUNTERS}},
        "versions": {"megatron-core": "0.16.1", "torch": "2.13.0"},
        "state": {"step": step, "position": 4 * step, "seconds": 1.5, "before": 0.5},
    }


def store(folder: Path, step: int, attach: Callable[[Path], object] = lambda written: None) -> Path:
    """Write the checkpoint of `step` into a folder of checkpoints; `attach` adds files to it."""
    written = draft(folder, step)
    (written / TENSORS).mkdir()
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (written / TENSORS / BACKENDS).write_text(json.dumps(backends))
    attach(written)
    publish(written, path_of(folder, step), manifest(step))
    return path_of(folder, step)
