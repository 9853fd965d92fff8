"""Advantages of a rollout batch, with a critic or without."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_troll.advantages import Advantage
from megatron_troll.batching.build import Advantages
from megatron_troll.critic import Critic
from megatron_troll.types import Rollout


@dataclass(frozen=True)
class Estimate:
    """advantages: one per response, or with a critic one per token. targets [T] of each response: what the
    critic should have expected; empty without one."""

    advantages: Advantages
    targets: list[np.ndarray]

    @property
    def means(self) -> list[float]:
        """One number per response."""
        return [float(np.mean(advantage)) for advantage in self.advantages]


def estimate(
    method: Advantage, critic: Critic | None, rollouts: Sequence[Rollout], rewards: np.ndarray, step: int
) -> Estimate:
    """With a critic, asks it for the values of every token. Blocks on all ranks then."""
    reward, group = torch.from_numpy(rewards), torch.tensor([rollout.group for rollout in rollouts])
    if critic is None:
        return Estimate(method(reward, group).tolist(), [])
    values = critic.values(rollouts, step)
    lengths = values.length.tolist()
    advantages = method(reward, group, values).split(lengths)
    targets = method.targets(reward, values).float().split(lengths)
    return Estimate(
        [spread(part.numpy(), rollout) for part, rollout in zip(advantages, rollouts)],
        [spread(part.numpy(), rollout) for part, rollout in zip(targets, rollouts)],
    )


def spread(values: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Values of the tokens that carry loss, at their places among all tokens of the response [T]; 0
    elsewhere."""
    whole = np.zeros(len(rollout.response_ids), dtype=np.float32)
    whole[rollout.mask > 0] = values
    return whole
