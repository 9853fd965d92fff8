"""Rollout batches that are sampled and not yet trained on, and how a checkpoint keeps them."""

import json
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_troll.judging import Judged
from megatron_troll.rollout import archive
from megatron_troll.types import Prompt


@dataclass(frozen=True)
class Batch:
    """trained: rollout batches that the policy had been trained on when this one was sampled."""

    judged: Judged
    trained: int


@dataclass
class Pending:
    """Batches for training `staleness` steps after they were sampled, oldest first; `last` is the last step.
    In a checkpoint, batch i is pending_<i>.npz, .json and .judged.json."""

    staleness: int
    last: int
    batches: deque[Batch] = field(default_factory=deque)

    def next(self, step: int, sample: Callable[[int], Judged]) -> Batch:
        """The batch to train on in `step`, after `sample(number)` of every batch that is due by now: at first
        `staleness` + 1 of them, then one a step, and none that no step is left for."""
        due = min(step + self.staleness, self.last)
        for number in range(step + len(self.batches), due + 1):
            self.batches.append(Batch(sample(number), trained=step - 1))
        return self.batches.popleft()

    def write(self, folder: Path) -> None:
        for i, batch in enumerate(self.batches):
            path, judged = folder / f"pending_{i:03d}", batch.judged
            archive.write(path, judged.rollouts)
            rest = {
                "trained": batch.trained,
                "reward": judged.reward.tolist(),
                "timeouts": judged.timeouts,
                "crashes": judged.crashes,
            }
            (folder / f"{path.name}.judged.json").write_text(json.dumps(rest))

    def read(self, folder: Path, prompts: Mapping[str, Prompt]) -> None:
        """Replace everything by what `write` left. Raises DataError for a prompt that is not in `prompts`."""
        self.batches.clear()
        for file in sorted(folder.glob("pending_*.judged.json")):
            rest = json.loads(file.read_text())
            rollouts = archive.read(folder / file.name.removesuffix(".judged.json"), prompts)
            reward = np.array(rest["reward"], dtype=np.float32)
            judged = Judged(rollouts, reward, rest["timeouts"], rest["crashes"])
            self.batches.append(Batch(judged, rest["trained"]))
