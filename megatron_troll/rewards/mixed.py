"""Rewards of a batch from several sources, each source with a reward of its own."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import numpy as np

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.score import ScoredVotes, Scorer, Scores
from megatron_troll.types import Rollout


class MixedScorer:
    """Scores each rollout with the reward of its source (`Prompt.source`); sources with equal rewards share
    their processes, `workers` per verifier. Close it, or use it in a `with` block. Raises ConfigError for an
    unknown verifier or field."""

    def __init__(
        self,
        rewards: Mapping[str, RewardConfig],
        workers: int = 2,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        distinct = {config.model_dump_json(): config for config in rewards.values()}
        made = {key: Scorer(config, workers, progress) for key, config in distinct.items()}
        self._scorers = {source: made[config.model_dump_json()] for source, config in rewards.items()}

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Score all rollouts, source after source; blocks. See Scorer.score."""
        reward = np.zeros(len(rollouts), dtype=np.float32)
        keep = np.ones(len(rollouts), dtype=bool)
        counts = dict.fromkeys(("timeouts", "crashes", "errors", "unclosed"), 0)
        first_error = ""
        for source, places in _places(rollouts).items():
            scores = self._scorers[source].score([rollouts[i] for i in places])
            reward[places], keep[places] = scores.reward, scores.keep
            counts = {name: count + getattr(scores, name) for name, count in counts.items()}
            first_error = first_error or scores.first_error
        return Scores(reward, keep, **counts, first_error=first_error)

    @property
    def has_votes(self) -> bool:
        """Whether the verifier of every source extracts answers."""
        return all(scorer.has_votes for scorer in self._scorers.values())

    def votes(self, rollouts: Sequence[Rollout]) -> ScoredVotes:
        """The extracted answer of each rollout; blocks. See Scorer.votes."""
        votes: list[str | None] = [None] * len(rollouts)
        errors, first_error = 0, ""
        for source, places in _places(rollouts).items():
            found = self._scorers[source].votes([rollouts[i] for i in places])
            for i, vote in zip(places, found.votes):
                votes[i] = vote
            errors, first_error = errors + found.errors, first_error or found.first_error
        return ScoredVotes(votes, errors, first_error)

    def close(self) -> None:
        """End the worker processes."""
        for scorer in self._scorers.values():
            scorer.close()

    def __enter__(self) -> "MixedScorer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _places(rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
    """The places of the rollouts of each source."""
    places: dict[str, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        places.setdefault(rollout.prompt.source, []).append(i)
    return places
