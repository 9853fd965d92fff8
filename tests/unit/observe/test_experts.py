"""Metrics of expert loads against cases that can be counted by hand."""

import math

import pytest
import torch

from megatron_troll.observe.experts import expert_metrics, replay_metrics
from tests.documented import documented


def test_an_even_load_is_one() -> None:
    metrics = expert_metrics({0: torch.tensor([5, 5, 5, 5])})
    assert metrics["expert_load_max"] == 1
    assert metrics["expert_entropy"] == pytest.approx(1)


def test_the_least_even_layer_stands_for_all() -> None:
    metrics = expert_metrics({3: torch.tensor([2, 2, 0, 0]), 7: torch.tensor([4, 0, 0, 0])})
    assert metrics["expert_load_max/layer_3"] == 2
    assert metrics["expert_entropy/layer_3"] == pytest.approx(math.log(2) / math.log(4))
    assert metrics["expert_load_max"] == metrics["expert_load_max/layer_7"] == 4
    assert metrics["expert_entropy"] == metrics["expert_entropy/layer_7"] == 0


def test_what_replay_changed_is_a_share_of_the_choices() -> None:
    metrics = replay_metrics({0: (1, 1), 2: (6, 0)}, {0: torch.tensor([4, 4]), 2: torch.tensor([6, 2])}, 2)
    assert metrics == {
        "replay_changed": 7 / 16,
        "replay_left_out": 1 / 8,
        "replay_changed/layer_0": 1 / 8,
        "replay_changed/layer_2": 6 / 8,
    }
    assert all(documented(name) for name in metrics)
    assert replay_metrics({0: (0, 0)}, {0: torch.tensor([0, 0])}, 2)["replay_changed"] == 0


def test_every_metric_is_documented_and_a_dense_model_has_none() -> None:
    assert expert_metrics({}) == {}
    assert all(documented(name) for name in expert_metrics({0: torch.tensor([1, 2])}))
    assert not documented("loss/layer_0")
