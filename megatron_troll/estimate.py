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
    critic should have expected; empty without one. metrics: how well it expected it."""

    advantages: Advantages
    targets: list[np.ndarray]
    metrics: dict[str, float]

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
        return Estimate(method(reward, group).tolist(), [], {})
    values = critic.values(rollouts, step)
    lengths = values.length.tolist()
    advantages = method(reward, group, values).split(lengths)
    wanted = method.targets(reward, values)
    targets = wanted.float().split(lengths)
    return Estimate(
        [spread(part.numpy(), rollout) for part, rollout in zip(advantages, rollouts)],
        [spread(part.numpy(), rollout) for part, rollout in zip(targets, rollouts)],
        {"critic_explained_variance": explained_variance(values.value, wanted)},
    )


def explained_variance(values: torch.Tensor, targets: torch.Tensor) -> float:
    """1 - var(targets - values) / var(targets) over all tokens [L]: 1 for a critic that knows, 0 for one that
    is constant, less for one that misleads. NaN where all targets are equal."""
    if len(targets) == 0:
        return float("nan")
    spread = targets.double().var(correction=0)
    return float(1.0 - (targets - values).double().var(correction=0) / spread)


def spread(values: np.ndarray, rollout: Rollout) -> np.ndarray:
    """Values of the tokens that carry loss, at their places among all tokens of the response [T]; 0
    elsewhere."""
    whole = np.zeros(len(rollout.response_ids), dtype=np.float32)
    whole[rollout.mask > 0] = values
    return whole
