"""Rewards of a batch of rollouts."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.pool import Outcomes, RewardError, ScoringTask, WorkerPool
from megatron_troll.rewards.reward import VerifierCall, Votes, Wanted, build
from megatron_troll.types import Rollout


@dataclass(frozen=True)
class Scores:
    """reward [B] float32; keep [B] bool, False for rollouts excluded from the loss (aborted, or cut at
    max_tokens with `overlong.mode: mask`). `timeouts` and `crashes` count the answers that got 0 because
    their verifier timed out or was killed."""

    reward: np.ndarray
    keep: np.ndarray
    timeouts: int
    crashes: int


class Scorer:
    """Scores rollouts with one verifier, in `workers` processes unless it is cheap. Close it, or use it in a
    `with` block. `progress` is called after each answer. Raises ConfigError for an unknown verifier or
    field."""

    def __init__(self, config: RewardConfig, workers: int = 2, progress: Callable[[], object] = lambda: None):
        self._config = config
        self._verifier = build(config)
        self._progress = progress
        self._pool = None if self._verifier.cheap else WorkerPool(config, workers, progress)

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Score all rollouts; blocks. Aborted rollouts, and with `overlong.mode: penalise` those cut at
        max_tokens, are not passed to the verifier. Raises RewardError if a reward is not a finite float."""
        overlong = self._config.overlong
        reward = np.zeros(len(rollouts), dtype=np.float32)
        keep = np.ones(len(rollouts), dtype=bool)
        for index, rollout in enumerate(rollouts):
            cut = rollout.finish == "length"
            if rollout.finish == "abort" or (cut and overlong.mode == "mask"):
                keep[index] = False
            if cut and overlong.mode == "penalise":
                reward[index] = overlong.reward
        judged = self._judged(rollouts)
        outcomes = self._run(_tasks(rollouts, judged, "reward"))
        for task, value in outcomes.values.items():
            reward[judged[task]] = _checked(value, rollouts[judged[task]].name, self._config.name)
        return Scores(reward, keep, len(outcomes.timeouts), len(outcomes.crashes))

    @property
    def has_votes(self) -> bool:
        """Whether the verifier extracts answers."""
        return isinstance(self._verifier, Votes)

    def votes(self, rollouts: Sequence[Rollout]) -> list[str | None]:
        """The extracted answer of each rollout; None if it has none, if the extraction timed out or was
        killed, or if the rollout is not passed to the verifier (see `score`). Blocks. Raises RewardError if
        an answer is not text."""
        votes: list[str | None] = [None] * len(rollouts)
        judged = self._judged(rollouts)
        for task, value in self._run(_tasks(rollouts, judged, "vote")).values.items():
            if not isinstance(value, str | None):
                name = rollouts[judged[task]].name
                raise RewardError(
                    f"reward {self._config.name!r} gave {value!r} as the vote of {name}; expected text"
                )
            votes[judged[task]] = value
        return votes

    def _judged(self, rollouts: Sequence[Rollout]) -> list[int]:
        """Indices of the rollouts that are passed to the verifier."""
        unseen = ("abort", "length") if self._config.overlong.mode == "penalise" else ("abort",)
        return [index for index, rollout in enumerate(rollouts) if rollout.finish not in unseen]

    def close(self) -> None:
        """End the worker processes."""
        if self._pool is not None:
            self._pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, tasks: Sequence[ScoringTask]) -> Outcomes:
        if self._pool is not None:
            return self._pool.run(tasks)
        outcomes = Outcomes()
        for index, task in enumerate(tasks):
            outcomes.values[index] = task.question.put_to(self._verifier)
            self._progress()
        return outcomes


def _tasks(rollouts: Sequence[Rollout], chosen: Sequence[int], wanted: Wanted) -> list[ScoringTask]:
    asked = [rollouts[i] for i in chosen]
    return [
        ScoringTask(rollout.name, VerifierCall(rollout.text, rollout.prompt, wanted)) for rollout in asked
    ]


def _checked(value: object, sample: str, verifier: str) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise RewardError(f"reward {verifier!r} gave {value!r} for {sample}; expected a finite float")
    return value
