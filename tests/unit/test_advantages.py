import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_troll.advantages import Values, zero_variance
from megatron_troll.advantages.dr_grpo import DrGrpo
from megatron_troll.advantages.gae import Gae, gae
from megatron_troll.advantages.grpo import Grpo
from megatron_troll.advantages.rloo import Rloo
from megatron_troll.config import ConfigError, ObjectiveConfig, Slot
from megatron_troll.objectives import compose

REWARDS = torch.tensor([1.0, 2.0, 0.0, 0.0, 4.0, 1.0], dtype=torch.float64)
GROUP = torch.tensor([7, 3, 7, 7, 3, 7])


@pytest.mark.parametrize(("ddof", "std"), [(1, (3**-0.5, 2**0.5)), (0, (0.5, 1.0))])
def test_grpo_by_hand(ddof, std):
    """Two prompts, interleaved: (1, 0, 0, 1) has mean 1/2; (2, 4) mean 3."""
    first, second = 0.5 / (std[0] + 1e-6), 1.0 / (std[1] + 1e-6)
    expected = [first, -second, -first, -first, second, first]
    assert Grpo(ddof=ddof)(REWARDS, GROUP).tolist() == pytest.approx(expected, rel=1e-12)


def test_dr_grpo_by_hand():
    assert DrGrpo()(REWARDS, GROUP).tolist() == [0.5, -1.0, -0.5, -0.5, 1.0, 0.5]


def test_rloo_by_hand():
    """The others of a 1 in (1, 0, 0, 1) have mean 1/3, those of a 0 have 2/3."""
    expected = [2 / 3, -2.0, -2 / 3, -2 / 3, 2.0, 2 / 3]
    assert Rloo()(REWARDS, GROUP).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", [Grpo(), DrGrpo(), Rloo()])
def test_equal_rewards_give_exactly_zero(method):
    rewards = torch.full((3,), 0.1)
    assert method(rewards, torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", [Grpo(), DrGrpo(), Rloo()])
def test_a_group_of_one_is_refused(method):
    with pytest.raises(ValueError, match=r"prompts \[4\] have one response: \w+ needs rollout.samples >= 2"):
        method(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([2, 2, 4]))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=6), min_size=1, max_size=4))
def test_group_methods_are_centred(groups):
    rewards = torch.tensor([reward for group in groups for reward in group], dtype=torch.float64)
    group = torch.tensor([i for i, members in enumerate(groups) for _ in members])
    for method in (Grpo(), DrGrpo(), Rloo()):
        assert method.needs_values is False
        sums = torch.zeros(len(groups), dtype=torch.float64).index_add(0, group, method(rewards, group))
        assert sums.abs().max() < 1e-6


def test_share_of_prompts_without_a_signal():
    rewards, group = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 5, 5])
    assert zero_variance(rewards, group).item() == 0.5


def naive(values: list[float], reward: float, gamma: float, lam: float) -> list[float]:
    """The double sum of eq. 16."""
    rewards = [0.0] * (len(values) - 1) + [reward]
    deltas = [r + gamma * v1 - v0 for r, v0, v1 in zip(rewards, values, [*values[1:], 0.0])]
    return [
        sum((gamma * lam) ** (j - t) * deltas[j] for j in range(t, len(values))) for t in range(len(values))
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-3, 3, width=32), max_size=5), min_size=1, max_size=4),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_gae_is_its_double_sum(responses, gamma, lam):
    rewards = [float(i) - 1.0 for i in range(len(responses))]
    values = torch.tensor([v for response in responses for v in response], dtype=torch.float64)
    lengths = torch.tensor([len(response) for response in responses])
    advantages, returns = gae(values, torch.tensor(rewards), lengths, gamma, lam)
    expected = [a for response, r in zip(responses, rewards) for a in naive(response, r, gamma, lam)]
    assert advantages.tolist() == pytest.approx(expected, abs=1e-9)
    assert torch.allclose(returns, advantages + values)


def test_gae_between_return_and_difference():
    """lam = 1: reward less value. lam = 0: one step ahead. An empty response has no tokens."""
    values, lengths = torch.tensor([0.5, 0.25, 0.0, 1.0]), torch.tensor([3, 0, 1])
    rewards = torch.tensor([2.0, 9.0, -1.0])
    whole, returns = gae(values, rewards, lengths, 1.0, 1.0)
    assert whole.tolist() == [1.5, 1.75, 2.0, -2.0]
    assert returns.tolist() == [2.0, 2.0, 2.0, -1.0]
    steps, _ = gae(values, rewards, lengths, 1.0, 0.0)
    assert steps.tolist() == [-0.25, -0.25, 2.0, -2.0]


def test_gae_is_whitened_over_all_tokens():
    values, rewards = Values(torch.randn(9), torch.tensor([4, 5])), torch.tensor([1.0, 0.0])
    group = torch.tensor([0, 1])
    plain, white = Gae(whiten=False)(rewards, group, values), Gae()(rewards, group, values)
    assert white.dtype == torch.float32
    assert white.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white.square().mean().item() == pytest.approx(1.0, abs=1e-5)
    assert torch.corrcoef(torch.stack([plain, white]))[0, 1] == pytest.approx(1.0)


def test_gae_of_nothing():
    values = Values(torch.zeros(0), torch.tensor([0, 0]))
    assert Gae()(torch.ones(2), torch.tensor([0, 1]), values).shape == (0,)


def test_gae_refuses_bad_input():
    rewards, group = torch.ones(2), torch.tensor([0, 1])
    assert Gae().needs_values
    with pytest.raises(ValueError, match=r"needs a critic's values: set models\.critic"):
        Gae()(rewards, group)
    with pytest.raises(ValueError, match="3 values and 2 rewards, but 2 lengths that add up to 4"):
        Gae()(rewards, group, Values(torch.zeros(3), torch.tensor([2, 2])))
    slot = Slot.model_validate({"name": "gae", "lam": 1.5})
    with pytest.raises(
        ConfigError, match=r"objective.advantage.lam: got 1.5, expected a number >= 0 and <= 1"
    ):
        compose(ObjectiveConfig(advantage=slot))
