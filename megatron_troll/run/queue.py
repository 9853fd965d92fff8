"""Rollout batches that are sampled but not yet trained on, and their storage in a checkpoint."""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from megatron_troll.data.rows import DataError
from megatron_troll.mcore.checkpoint_manifest import damaged
from megatron_troll.rewards.batch import ScoredBatch
from megatron_troll.rollout import archive
from megatron_troll.system import DAMAGED
from megatron_troll.types import Prompt, Rollout


@dataclass(frozen=True)
class RolloutBatch:
    """The samples of one step.

    sampled   all samples, in the order requested, those of a prompt next to each other
    kept      [S] bool, which of them are trained on: those of rollout.prompts prompts
    rollouts  the kept samples, their groups numbered from 0
    rounds    number of sampling rounds
    """

    sampled: ScoredBatch
    kept: np.ndarray
    rollouts: list[Rollout]
    rounds: int

    @property
    def reward(self) -> np.ndarray:
        """[B] float32 rewards of `rollouts`."""
        return self.sampled.reward[self.kept]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics over all samples: without the prompts that are always answered right, a batch would look as
        if the policy did not improve."""
        return {
            **self.sampled.metrics,
            "refill_rounds": self.rounds - 1,
            "dropped_groups": 1 - float(self.kept.mean()),
            "sampled_responses": len(self.kept),
        }


def ages(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """Age, in rollout batches, of the weights that sampled the tokens that `step` trains on."""
    versions = np.concatenate([rollout.versions for rollout in rollouts])
    mixed = [len(set(rollout.versions.tolist())) > 1 for rollout in rollouts]
    age = step - 1 - versions
    return {
        "version_age": float(age.mean()),
        "mixed_versions": float(np.mean(mixed)),
    }


@dataclass
class BatchFuture:
    """A batch that is being sampled, or complete.

    trained   rollout batches that the policy had been trained on when the batch was begun
    position  place in the prompt order before its prompts; used while it is being sampled
    finish    waits for the batch and returns it
    batch     the batch once it is complete, None before
    """

    trained: int
    position: int
    finish: Callable[[], RolloutBatch]
    batch: RolloutBatch | None = None

    def wait(self) -> RolloutBatch:
        """Return the batch. Blocks until it is complete."""
        if self.batch is None:
            self.batch = self.finish()
        return self.batch


@dataclass
class RolloutQueue:
    """Batches to train on `staleness` steps after they were begun, oldest first; `last` is the last step.
    In a checkpoint, batch i is pending_<i>.npz, .json and .batch.json."""

    staleness: int
    last: int
    batches: deque[BatchFuture] = field(default_factory=deque)

    def next(self, step: int, begin: Callable[[int], BatchFuture]) -> BatchFuture:
        """Begin the batches that are due by now with `begin(number)`, and return the complete batch to train
        on in `step`. The first call begins `staleness` + 1 batches, later calls one each, none past the last
        step. Blocks."""
        due = min(step + self.staleness, self.last)
        for number in range(step + len(self.batches), due + 1):
            self.batches.append(begin(number))
        self.batches[0].wait()
        return self.batches.popleft()

    def position(self, now: int) -> int:
        """The prompt position for a run that resumes with only the complete batches: before the prompts of
        the first incomplete batch; `now` if all are complete."""
        return next((waiting.position for waiting in self.batches if waiting.batch is None), now)

    def write(self, folder: Path) -> None:
        """Write the complete batches before the first incomplete one to `folder`."""
        for i, waiting in enumerate(self.batches):
            if (batch := waiting.batch) is None:
                break
            path = folder / f"pending_{i:03d}"
            archive.write(path, batch.sampled.rollouts)
            rest = {
                "trained": waiting.trained,
                "rounds": batch.rounds,
                "reward": batch.sampled.reward.tolist(),
                "success": batch.sampled.success.tolist(),
                "parts": {name: values.tolist() for name, values in batch.sampled.parts.items()},
                "timeouts": batch.sampled.timeouts,
                "crashes": batch.sampled.crashes,
                "errors": batch.sampled.errors,
                "unclosed": batch.sampled.unclosed,
                "kept": batch.kept.tolist(),
                "groups": [rollout.group for rollout in batch.rollouts],
            }
            (folder / f"{path.name}.batch.json").write_text(json.dumps(rest))

    def read(self, folder: Path, prompts: Mapping[str, Prompt], *, elsewhere: bool = False) -> None:
        """Replace all batches by those that `write` stored, with `elsewhere` all but top-K and experts, which
        rank 0 has (`Rollout.elsewhere`). Raises DataError for a prompt that is not in
        `prompts`, CheckpointError for a damaged file."""
        self.batches.clear()
        for file in sorted(folder.glob("pending_*.batch.json")):
            try:
                self.batches.append(_stored(file, prompts, elsewhere))
            except DataError:
                raise
            except DAMAGED as error:
                name = file.name.removesuffix(".batch.json")
                problem = f"or .json or .npz of {name} beside it cannot be read"
                raise damaged(file, f"{problem} ({type(error).__name__}: {error})") from None


def _stored(file: Path, prompts: Mapping[str, Prompt], elsewhere: bool) -> BatchFuture:
    rest = json.loads(file.read_text())
    sampled = ScoredBatch(
        rollouts=archive.read(
            file.with_name(file.name.removesuffix(".batch.json")), prompts, elsewhere=elsewhere
        ),
        reward=np.array(rest["reward"], dtype=np.float32),
        timeouts=rest["timeouts"],
        crashes=rest["crashes"],
        # Older checkpoints have none of these.
        success=np.array(rest.get("success", rest["reward"]), dtype=np.float32),
        parts={name: np.array(values, dtype=np.float32) for name, values in rest.get("parts", {}).items()},
        errors=rest.get("errors", 0),
        unclosed=rest.get("unclosed", 0),
    )
    kept = np.array(rest["kept"], dtype=bool)
    sizes = {len(each) for each in (sampled.reward, sampled.success, kept, *sampled.parts.values())}
    if sizes != {len(sampled.rollouts)}:
        raise ValueError(f"{len(sampled.rollouts)} rollouts, and figures of {sorted(sizes)}")
    trained_on = [rollout for rollout, keep in zip(sampled.rollouts, kept) if keep]
    numbered = zip(trained_on, rest["groups"], strict=True)
    rollouts = [replace(rollout, group=int(group)) for rollout, group in numbered]
    batch = RolloutBatch(sampled, kept, rollouts, int(rest["rounds"]))
    return BatchFuture(int(rest["trained"]), 0, lambda: batch, batch)
