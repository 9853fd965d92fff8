"""Rewards of a batch from several sources, each source with a reward of its own: one verifier, or several
whose rewards are added."""

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import numpy as np

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.length import NAME as LENGTH
from megatron_troll.rewards.length import length_penalty
from megatron_troll.rewards.score import ScoredVotes, Scorer, Scores
from megatron_troll.rewards.terms import Term, terms
from megatron_troll.types import Rollout


class MixedScorer:
    """Scores each rollout with the reward of its source (`Prompt.source`). Equal verifiers share their
    processes, `workers` each. `limit`: the longest answer that is sampled, in tokens, for penalties on
    length; None: answers have none, as in evaluations. Close it, or use it in a `with` block. Raises
    ConfigError for an unknown verifier or field."""

    def __init__(
        self,
        rewards: Mapping[str, RewardConfig],
        workers: int = 2,
        progress: Callable[[], object] = lambda: None,
        limit: int | None = None,
    ) -> None:
        self._rewards = dict(rewards)
        penalties = {
            source: None if limit is None else length_penalty(one, limit) for source, one in rewards.items()
        }
        self._penalties = {source: one for source, one in penalties.items() if one is not None}
        self._terms = {source: terms(config) for source, config in rewards.items()}
        every = [term.config for found in self._terms.values() for term in found]
        distinct = {config.model_dump_json(): config for config in every}
        self._scorers = {key: Scorer(config, workers, progress) for key, config in distinct.items()}
        names = {term.name for found in self._terms.values() for term in found if term.name}
        self._parts = sorted(names | ({LENGTH} if self._penalties else set()))

    def score(self, rollouts: Sequence[Rollout]) -> Scores:
        """Score all rollouts, source after source and part after part; blocks. See Scorer.score. A call of a
        verifier that fails costs its part of one answer."""
        size = len(rollouts)
        reward, success = np.zeros(size, dtype=np.float32), np.zeros(size, dtype=np.float32)
        keep = np.ones(size, dtype=bool)
        parts = {name: np.full(size, np.nan, dtype=np.float32) for name in self._parts}
        counts = dict.fromkeys(("timeouts", "crashes", "errors", "unclosed"), 0)
        first_error = ""
        for source, places in _places(rollouts).items():
            chosen, unclosed = [rollouts[i] for i in places], 0
            for term in self._terms[source]:
                scores = self._scorer(term).score(chosen)
                reward[places] += np.float32(term.weight) * scores.reward
                keep[places] = scores.keep
                if term.name:
                    parts[term.name][places] = scores.reward
                if term.succeeds:
                    success[places] = scores.reward
                for name in ("timeouts", "crashes", "errors"):
                    counts[name] += getattr(scores, name)
                # The same answers for every part that reads no reasoning.
                unclosed = max(unclosed, scores.unclosed)
                first_error = first_error or scores.first_error
            counts["unclosed"] += unclosed
            self._penalise(source, chosen, places, reward)
            if penalty := self._penalties.get(source):
                parts[LENGTH][places] = [penalty.of(len(rollout.response_ids)) for rollout in chosen]
                reward[places] += np.float32(penalty.weight) * parts[LENGTH][places]
        return Scores(reward, keep, **counts, first_error=first_error, success=success, parts=parts)

    def _penalise(
        self, source: str, rollouts: Sequence[Rollout], places: list[int], reward: np.ndarray
    ) -> None:
        """Give cut answers what stands for a sum; where there is one verifier alone, they have it already."""
        config = self._rewards[source]
        if config.overlong.mode == "penalise" and self._terms[source][0].name:
            for i, rollout in zip(places, rollouts):
                if rollout.finish == "length":
                    reward[i] = config.overlong.reward

    @property
    def has_votes(self) -> bool:
        """Whether the verifier that decides about success extracts answers, for every source."""
        return all(self._voter(source).has_votes for source in self._terms)

    def votes(self, rollouts: Sequence[Rollout]) -> ScoredVotes:
        """The extracted answer of each rollout; blocks. See Scorer.votes."""
        votes: list[str | None] = [None] * len(rollouts)
        errors, first_error = 0, ""
        for source, places in _places(rollouts).items():
            found = self._voter(source).votes([rollouts[i] for i in places])
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

    def _scorer(self, term: Term) -> Scorer:
        return self._scorers[term.config.model_dump_json()]

    def _voter(self, source: str) -> Scorer:
        return next(self._scorer(term) for term in self._terms[source] if term.succeeds)


def _places(rollouts: Sequence[Rollout]) -> dict[str, list[int]]:
    """The places of the rollouts of each source."""
    places: dict[str, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        places.setdefault(rollout.prompt.source, []).append(i)
    return places
