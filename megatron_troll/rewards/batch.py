"""Rewards of a rollout batch; each rank computes a share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_troll.parallel.groups import Group
from megatron_troll.rewards.score import Scorer
from megatron_troll.types import Rollout


@dataclass(frozen=True)
class ScoredBatch:
    """rollouts: the batch, with mask 0 for responses excluded from the loss; reward [B] float32."""

    rollouts: list[Rollout]
    reward: np.ndarray
    timeouts: int
    crashes: int

    @property
    def metrics(self) -> dict[str, float]:
        lengths = [len(rollout.response_ids) for rollout in self.rollouts]
        metrics = {
            "success": float(self.reward.mean()),
            "reward_std": float(self.reward.std()),
            "response_length": float(np.mean(lengths)),
            "truncated": float(np.mean([rollout.finish == "length" for rollout in self.rollouts])),
        }
        failed = {"reward_timeouts": self.timeouts, "reward_crashes": self.crashes}
        return metrics | {name: float(count) for name, count in failed.items() if count}


def together(parts: Sequence[ScoredBatch]) -> ScoredBatch:
    """Concatenate several batches, in order."""
    return ScoredBatch(
        rollouts=[rollout for part in parts for rollout in part.rollouts],
        reward=np.concatenate([part.reward for part in parts]),
        timeouts=sum(part.timeouts for part in parts),
        crashes=sum(part.crashes for part in parts),
    )


def judge(scorer: Scorer, rollouts: Sequence[Rollout], world: Group) -> ScoredBatch:
    """Score one share of the rollouts on each rank and gather all; every rank returns the same. Blocks."""
    shares = world.all_gather_objects(scorer.score(rollouts[world.rank :: world.size]))
    reward = np.empty(len(rollouts), dtype=np.float32)
    keep = np.empty(len(rollouts), dtype=bool)
    for rank, share in enumerate(shares):
        reward[rank :: world.size], keep[rank :: world.size] = share.reward, share.keep
    kept = [r if k else replace(r, mask=np.zeros_like(r.mask)) for r, k in zip(rollouts, keep)]
    return ScoredBatch(kept, reward, sum(s.timeouts for s in shares), sum(s.crashes for s in shares))


def extract(scorer: Scorer, rollouts: Sequence[Rollout], world: Group) -> list[str | None]:
    """The vote of each rollout (Scorer.votes), computed in shares like `judge`. Blocks."""
    votes: list[str | None] = [None] * len(rollouts)
    for rank, share in enumerate(world.all_gather_objects(scorer.votes(rollouts[world.rank :: world.size]))):
        votes[rank :: world.size] = share
    return votes
