"""Rollout batches that are sampled and not yet trained on, and how a checkpoint keeps them."""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_troll.rewards.batch import ScoredBatch
from megatron_troll.rollout import archive
from megatron_troll.types import Prompt, Rollout


@dataclass(frozen=True)
class RolloutBatch:
    """What was sampled for one step.

    sampled   everything, in the order drawn, the samples of a prompt next to each other
    kept      [S] bool, what of it is trained on: the samples of rollout.prompts prompts
    rollouts  those, their groups counted from 0
    rounds    times that prompts were drawn
    """

    sampled: ScoredBatch
    kept: np.ndarray
    rollouts: list[Rollout]
    rounds: int

    @property
    def reward(self) -> np.ndarray:
        """[B] float32, of `rollouts`."""
        return self.sampled.reward[self.kept]

    @property
    def metrics(self) -> dict[str, float]:
        """Of everything sampled: a batch without the prompts that are always answered right would look as if
        the policy did not improve."""
        return {
            **self.sampled.metrics,
            "refill_rounds": self.rounds - 1,
            "dropped_groups": 1 - float(self.kept.mean()),
            "sampled_responses": len(self.kept),
        }


def ages(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """How old the weights are that drew what `step` trains on, in rollout batches."""
    versions = np.concatenate([rollout.versions for rollout in rollouts])
    mixed = [len(set(rollout.versions.tolist())) > 1 for rollout in rollouts]
    age = step - 1 - versions
    return {
        "version_age": float(age.mean()),
        "mixed_versions": float(np.mean(mixed)),
    }


@dataclass
class BatchFuture:
    """A batch that is under way, or there.

    trained   rollout batches that the policy had been trained on when it was begun
    position  in the prompt order, before its prompts; of use while it is under way
    finish    waits for it
    batch     once it is there
    """

    trained: int
    position: int
    finish: Callable[[], RolloutBatch]
    batch: RolloutBatch | None = None

    def wait(self) -> RolloutBatch:
        """Blocks until it is there."""
        if self.batch is None:
            self.batch = self.finish()
        return self.batch


@dataclass
class RolloutQueue:
    """Batches for training `staleness` steps after they were begun, oldest first; `last` is the last step.
    In a checkpoint, batch i is pending_<i>.npz, .json and .batch.json."""

    staleness: int
    last: int
    batches: deque[BatchFuture] = field(default_factory=deque)

    def next(self, step: int, begin: Callable[[int], BatchFuture]) -> BatchFuture:
        """The batch to train on in `step`, which is there, after `begin(number)` of every batch that is due
        by now: first `staleness` + 1 of them, then one a step, and none that no step is left for. Blocks."""
        due = min(step + self.staleness, self.last)
        for number in range(step + len(self.batches), due + 1):
            self.batches.append(begin(number))
        self.batches[0].wait()
        return self.batches.popleft()

    def position(self, now: int) -> int:
        """Where the prompts go on for a run that has just what is there: before those of the first batch that
        is under way; `now` where none is."""
        return next((waiting.position for waiting in self.batches if waiting.batch is None), now)

    def write(self, folder: Path) -> None:
        """What is there, up to the first batch that is under way."""
        for i, waiting in enumerate(self.batches):
            if (batch := waiting.batch) is None:
                break
            path = folder / f"pending_{i:03d}"
            archive.write(path, batch.sampled.rollouts)
            rest = {
                "trained": waiting.trained,
                "rounds": batch.rounds,
                "reward": batch.sampled.reward.tolist(),
                "timeouts": batch.sampled.timeouts,
                "crashes": batch.sampled.crashes,
                "kept": batch.kept.tolist(),
                "groups": [rollout.group for rollout in batch.rollouts],
            }
            (folder / f"{path.name}.batch.json").write_text(json.dumps(rest))

    def read(self, folder: Path, prompts: Mapping[str, Prompt]) -> None:
        """Replace everything by what `write` left. Raises DataError for a prompt that is not in `prompts`."""
        self.batches.clear()
        for file in sorted(folder.glob("pending_*.batch.json")):
            rest = json.loads(file.read_text())
            sampled = ScoredBatch(
                rollouts=archive.read(folder / file.name.removesuffix(".batch.json"), prompts),
                reward=np.array(rest["reward"], dtype=np.float32),
                timeouts=rest["timeouts"],
                crashes=rest["crashes"],
            )
            kept = np.array(rest["kept"], dtype=bool)
            trained_on = [rollout for rollout, keep in zip(sampled.rollouts, kept) if keep]
            rollouts = [replace(rollout, group=group) for rollout, group in zip(trained_on, rest["groups"])]
            batch = RolloutBatch(sampled, kept, rollouts, rest["rounds"])
            self.batches.append(BatchFuture(rest["trained"], 0, lambda batch=batch: batch, batch))
