"""What was sampled for one step, and what of it is trained on."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_troll.judging import Judged
from megatron_troll.types import Rollout


@dataclass(frozen=True)
class Collected:
    """What was sampled for one step.

    sampled   everything, in the order drawn, the samples of a prompt next to each other
    kept      [S] bool, what of it is trained on: the samples of rollout.prompts prompts
    rollouts  those, their groups counted from 0
    rounds    times that prompts were drawn
    """

    sampled: Judged
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
