"""Rewards of a batch of rollouts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.answers import after_reasoning
from megatron_troll.rewards.pool import Outcomes, RewardError, ScoringTask, WorkerPool
from megatron_troll.rewards.reward import MachineError, VerifierCall, Votes, Wanted, attempt, build
from megatron_troll.types import Rollout


@dataclass(frozen=True)
class Scores:
    """reward [B] float32; keep [B] bool, False for rollouts excluded from the loss (aborted, or cut at
    max_tokens with `overlong.mode: mask`). Counted are the answers that got 0 because their verifier timed
    out, was killed, or raised (errors; first_error describes one), or their reasoning is not closed. success
    [B] float32 is the reward, of a sum the part that is its success; parts: [B] float32 of each part of a
    sum, by its name, NaN for an answer that it does not judge."""

    reward: np.ndarray
    keep: np.ndarray
    timeouts: int
    crashes: int
    errors: int
    unclosed: int
    first_error: str
    success: np.ndarray
    parts: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredVotes:
    """votes [B], None for a rollout without an answer; errors: rollouts on which the extraction raised."""

    votes: list[str | None]
    errors: int
    first_error: str


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
        max_tokens, are not passed to the verifier, and neither are those whose reasoning is not closed.
        Raises RewardError if the verifier cannot be built or the machine fails it."""
        overlong = self._config.overlong
        reward = np.zeros(len(rollouts), dtype=np.float32)
        keep = np.ones(len(rollouts), dtype=bool)
        for index, rollout in enumerate(rollouts):
            cut = rollout.finish == "length"
            if rollout.finish == "abort" or (cut and overlong.mode == "mask"):
                keep[index] = False
            if cut and overlong.mode == "penalise":
                reward[index] = overlong.reward
        texts, unclosed = self._texts(rollouts)
        outcomes = self._run(rollouts, texts, "reward")
        for index, value in outcomes.values.items():
            reward[index] = value
        told = self._first_error(outcomes, rollouts)
        failed = len(outcomes.timeouts), len(outcomes.crashes), len(outcomes.errors), unclosed
        return Scores(reward, keep, *failed, told, success=reward)

    @property
    def has_votes(self) -> bool:
        """Whether the verifier extracts answers."""
        return isinstance(self._verifier, Votes)

    def votes(self, rollouts: Sequence[Rollout]) -> ScoredVotes:
        """The extracted answer of each rollout; None if it has none, if the extraction failed, or if the
        rollout is not passed to the verifier (see `score`). Blocks."""
        votes: list[str | None] = [None] * len(rollouts)
        outcomes = self._run(rollouts, self._texts(rollouts)[0], "vote")
        for index, value in outcomes.values.items():
            votes[index] = None if value is None else str(value)
        return ScoredVotes(votes, len(outcomes.errors), self._first_error(outcomes, rollouts))

    def _texts(self, rollouts: Sequence[Rollout]) -> tuple[dict[int, str], int]:
        """The texts that are passed to the verifier, by the index of their rollout; the number of rollouts
        whose reasoning is not closed."""
        unseen = ("abort", "length") if self._config.overlong.mode == "penalise" else ("abort",)
        seen = {i: rollout for i, rollout in enumerate(rollouts) if rollout.finish not in unseen}
        if self._config.reasoning == "keep":
            return {index: rollout.text for index, rollout in seen.items()}, 0
        after = {i: after_reasoning(r.text, r.prompt.opens_reasoning) for i, r in seen.items()}
        texts = {index: text for index, text in after.items() if text is not None}
        return texts, len(after) - len(texts)

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

    def _run(self, rollouts: Sequence[Rollout], texts: dict[int, str], wanted: Wanted) -> Outcomes:
        """The outcomes by index of the rollout."""
        tasks = [
            ScoringTask(rollouts[i].name, VerifierCall(text, rollouts[i].prompt, wanted))
            for i, text in texts.items()
        ]
        found = self._here(tasks) if self._pool is None else self._pool.run(tasks)
        places = list(texts)
        return Outcomes(
            values={places[task]: value for task, value in found.values.items()},
            timeouts={places[task] for task in found.timeouts},
            crashes={places[task] for task in found.crashes},
            errors={places[task]: what for task, what in found.errors.items()},
        )

    def _here(self, tasks: Sequence[ScoringTask]) -> Outcomes:
        outcomes = Outcomes()
        for index, task in enumerate(tasks):
            try:
                outcomes.add(index, attempt(task.question, self._verifier))
            except MachineError as error:
                raise RewardError(f"reward {self._config.name!r} failed on {task.name}:\n{error}") from error
            self._progress()
        return outcomes

    def _first_error(self, outcomes: Outcomes, rollouts: Sequence[Rollout]) -> str:
        if not outcomes.errors:
            return ""
        first = min(outcomes.errors)
        return f"reward {self._config.name!r} failed on {rollouts[first].name}: {outcomes.errors[first]}"
