"""Advantages of a batch, with and without a critic."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_troll.advantages import Values
from megatron_troll.advantages.gae import Gae
from megatron_troll.advantages.grpo import Grpo
from megatron_troll.training.critic import Critic, estimate, explained_variance
from megatron_troll.types import Prompt, Rollout, marked

REWARDS = np.array([1.0, 0.0], dtype=np.float32)


def rollout(sample: int, mask: list[float]) -> Rollout:
    ids = np.arange(len(mask))
    logp = np.zeros(len(mask), dtype=np.float32)
    return Rollout(
        Prompt("p", (), ""), 0, sample, ids[:1], ids, marked(np.array(mask), ids), logp, 7,
        None, "", "stop", 1.0,
    )  # fmt: skip


@dataclass(frozen=True)
class Constant(Critic):
    """Expects 0.5 of every token."""

    def values(self, rollouts, step):
        lengths = torch.tensor([int(r.mask.sum()) for r in rollouts])
        return Values(torch.full((int(lengths.sum()),), 0.5), lengths)


def test_without_a_critic_each_response_has_one_advantage() -> None:
    found = estimate(Grpo(), None, [rollout(0, [1, 1]), rollout(1, [1])], REWARDS, step=1)
    assert found.advantages == found.means
    assert found.advantages[0] == -found.advantages[1] > 0
    assert found.targets == []
    assert found.metrics == {}


def test_a_critics_tokens_keep_their_places_beside_masked_ones() -> None:
    rollouts = [rollout(0, [1, 0, 1]), rollout(1, [1])]
    critic = Constant(None, None, None)  # pyright: ignore[reportArgumentType]
    found = estimate(Gae(lam=1.0, whiten=False), critic, rollouts, REWARDS, step=1)
    first, second = found.advantages
    assert np.asarray(first).tolist() == [0.5, 0.0, 0.5]
    assert np.asarray(second).tolist() == [-0.5]
    assert [target.tolist() for target in found.targets] == [[1.0, 0.0, 1.0], [0.0]]


def test_a_response_without_loss_tokens_takes_no_advantage() -> None:
    masked = rollout(1, [1, 1]).masked()
    critic = Constant(None, None, None)  # pyright: ignore[reportArgumentType]
    found = estimate(Gae(), critic, [rollout(0, [1]), masked], REWARDS, step=1)
    assert np.asarray(found.advantages[1]).tolist() == [0.0, 0.0]


def test_explained_variance() -> None:
    targets = torch.tensor([0.0, 1.0, 2.0])
    assert explained_variance(targets, targets) == 1
    assert explained_variance(torch.ones(3), targets) == 0
    assert explained_variance(-targets, targets) == pytest.approx(-3)
