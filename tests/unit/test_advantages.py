import pytest
import torch

from megatron_troll.advantages import zero_variance
from megatron_troll.advantages.grpo import Grpo


def test_grpo_by_hand():
    """Two prompts, interleaved: (1, 0, 0, 1) has mean 1/2, std sqrt(1/3); (2, 4) mean 3, std sqrt(2)."""
    rewards = torch.tensor([1.0, 2.0, 0.0, 0.0, 4.0, 1.0], dtype=torch.float64)
    group = torch.tensor([7, 3, 7, 7, 3, 7])
    first, second = 0.5 / (3**-0.5 + 1e-6), 1.0 / (2**0.5 + 1e-6)
    expected = [first, -second, -first, -first, second, first]
    assert Grpo()(rewards, group).tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_rewards_give_exactly_zero():
    rewards = torch.full((3,), 0.1)
    assert Grpo()(rewards, torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_a_group_of_one_is_refused():
    with pytest.raises(ValueError, match=r"prompts \[4\] have one response"):
        Grpo()(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2, 2, 4]))


def test_share_of_prompts_without_a_signal():
    rewards, group = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 5, 5])
    assert zero_variance(rewards, group).item() == 0.5
