"""Rewards of a rollout batch; each rank computes a share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_troll.parallel.groups import Group
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.rewards.score import ScoredVotes, Scores
from megatron_troll.types import Rollout


@dataclass(frozen=True)
class ScoredBatch:
    """rollouts: the batch, with mask 0 for responses excluded from the loss; reward, success [B] float32,
    and parts as in Scores. Counted are the responses that got 0 for one of the reasons of Scores."""

    rollouts: list[Rollout]
    reward: np.ndarray
    success: np.ndarray
    timeouts: int
    crashes: int
    errors: int = 0
    unclosed: int = 0
    parts: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        lengths = [len(rollout.response_ids) for rollout in self.rollouts]
        metrics = {
            "success": float(self.success.mean()),
            "reward_std": float(self.reward.std()),
            "response_length": float(np.mean(lengths)),
            "truncated": float(np.mean([rollout.finish == "length" for rollout in self.rollouts])),
        }
        failed = {
            "reward_timeouts": self.timeouts,
            "reward_crashes": self.crashes,
            "reward_errors": self.errors,
            "unclosed_reasoning": self.unclosed,
        }
        failed = {name: float(count) for name, count in failed.items() if count}
        return metrics | self._parts | by_source("success", self.rollouts, self.success) | failed

    @property
    def _parts(self) -> dict[str, float]:
        """The mean of a sum and of each of its parts, over the responses that they judged."""
        if not self.parts:
            return {}
        judged = {name: values[~np.isnan(values)] for name, values in self.parts.items()}
        means = {f"reward/{name}": float(values.mean()) for name, values in judged.items() if len(values)}
        return {"reward": float(self.reward.mean())} | means


def by_source(name: str, rollouts: Sequence[Rollout], values: np.ndarray) -> dict[str, float]:
    """`name/SOURCE`: the mean of `values` [B] over the rollouts of each source that has a name."""
    sources = np.array([rollout.prompt.source for rollout in rollouts])
    return {
        f"{name}/{source}": float(values[sources == source].mean())
        for source in np.unique(sources).tolist()
        if source
    }


def together(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """Concatenate several batches, in order."""
    return ScoredBatch(
        rollouts=[rollout for part in parts for rollout in part.rollouts],
        reward=np.concatenate([part.reward for part in parts]),
        success=np.concatenate([part.success for part in parts]),
        parts={name: np.concatenate([part.parts[name] for part in parts]) for name in parts[0].parts},
        **_counts(parts),
    )


def judge(
    scorer: MixedScorer, rollouts: Sequence[Rollout], world: Group, say: Callable[[str], object]
) -> ScoredBatch:
    """Score one share of the rollouts on each rank and gather all; every rank returns the same. `say` is told
    of answers on which the verifier raised. Blocks; raises RewardError on every rank if the verifier fails
    on one."""
    shares = _shares(world, lambda: scorer.score(rollouts[world.rank :: world.size]))
    keep = _gathered([share.keep for share in shares])
    _tell_errors(shares, len(rollouts), say)
    return ScoredBatch(
        rollouts=[r if k else r.masked() for r, k in zip(rollouts, keep)],
        reward=_gathered([share.reward for share in shares]),
        success=_gathered([share.success for share in shares]),
        parts={name: _gathered([share.parts[name] for share in shares]) for name in shares[0].parts},
        **_counts(shares),
    )


def _gathered(shares: Sequence[np.ndarray]) -> np.ndarray:
    """[B] values from those of every rank, which has each R-th of them."""
    values = np.empty(sum(map(len, shares)), dtype=shares[0].dtype)
    for rank, share in enumerate(shares):
        values[rank :: len(shares)] = share
    return values


def _shares[T](world: Group, act: Callable[[], T]) -> list[T]:
    """Return the results of `act` of all ranks. An error of one rank is raised on all: none waits for it."""
    return world.all_gather_objects(world.each(act))


def _counts(parts: Sequence[ScoredBatch | Scores]) -> dict[str, int]:
    """The counts of several parts, added up."""
    return {
        name: sum(getattr(part, name) for part in parts)
        for name in ("timeouts", "crashes", "errors", "unclosed")
    }


def extract(
    scorer: MixedScorer, rollouts: Sequence[Rollout], world: Group, say: Callable[[str], object]
) -> list[str | None]:
    """The vote of each rollout (Scorer.votes), computed in shares and with `say` like `judge`. Blocks."""
    votes: list[str | None] = [None] * len(rollouts)
    shares = _shares(world, lambda: scorer.votes(rollouts[world.rank :: world.size]))
    for rank, share in enumerate(shares):
        votes[rank :: world.size] = share.votes
    _tell_errors(shares, len(rollouts), say)
    return votes


def _tell_errors(shares: Sequence[Scores | ScoredVotes], answers: int, say: Callable[[str], object]) -> None:
    errors = sum(share.errors for share in shares)
    if errors:
        first = next(share.first_error for share in shares if share.first_error)
        say(f"{first}; {errors} of {answers} answers failed and count as wrong")
