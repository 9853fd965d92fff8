"""Rewards of a rollout batch; each rank computes a share."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_troll.parallel.groups import Group
from megatron_troll.rewards.mixed import MixedScorer
from megatron_troll.rewards.score import ScoredVotes, Scores
from megatron_troll.types import Rollout


@dataclass(frozen=True)
class ScoredBatch:
    """rollouts: the batch, with mask 0 for responses excluded from the loss; reward [B] float32. Counted are
    the responses that got 0 for one of the reasons of Scores."""

    rollouts: list[Rollout]
    reward: np.ndarray
    timeouts: int
    crashes: int
    errors: int = 0
    unclosed: int = 0

    @property
    def metrics(self) -> dict[str, float]:
        lengths = [len(rollout.response_ids) for rollout in self.rollouts]
        metrics = {
            "success": float(self.reward.mean()),
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
        return metrics | by_source("success", self.rollouts, self.reward) | failed


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
        **_counts(parts),
    )


def judge(
    scorer: MixedScorer, rollouts: Sequence[Rollout], world: Group, say: Callable[[str], object]
) -> ScoredBatch:
    """Score one share of the rollouts on each rank and gather all; every rank returns the same. `say` is told
    of answers on which the verifier raised. Blocks; raises RewardError on every rank if the verifier fails
    on one."""
    shares = _shares(world, lambda: scorer.score(rollouts[world.rank :: world.size]))
    reward = np.empty(len(rollouts), dtype=np.float32)
    keep = np.empty(len(rollouts), dtype=bool)
    for rank, share in enumerate(shares):
        reward[rank :: world.size], keep[rank :: world.size] = share.reward, share.keep
    _tell_errors(shares, len(rollouts), say)
    return ScoredBatch(
        rollouts=[r if k else replace(r, mask=np.zeros_like(r.mask)) for r, k in zip(rollouts, keep)],
        reward=reward,
        **_counts(shares),
    )


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
