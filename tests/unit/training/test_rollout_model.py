"""The weight of the distillation follows the measured KL."""

import math

import pytest

from megatron_troll.config import Distill
from megatron_troll.training.rollout_model import moved

CONTROL = Distill(target_kl=0.1, gain=0.5)


def test_the_weight_rises_above_the_target_and_falls_below() -> None:
    assert moved(CONTROL, 2.0, 0.1) == 2.0
    assert moved(CONTROL, 2.0, 0.2) == pytest.approx(2.0 * 2**0.5)
    assert moved(CONTROL, 2.0, 0.05) == pytest.approx(2.0 / 2**0.5)


def test_a_step_is_bounded_and_so_is_the_weight() -> None:
    assert moved(CONTROL, 2.0, 1e6) == pytest.approx(2.0 * math.exp(0.5))
    assert moved(CONTROL, 2.0, 1e-9) == pytest.approx(2.0 / math.exp(0.5))
    assert moved(CONTROL, 99.0, 1e6) == 100.0
    assert moved(CONTROL, 0.011, 1e-9) == 0.01


@pytest.mark.parametrize("kl", [math.nan, math.inf, 0.0, -1e-6])
def test_what_measures_nothing_moves_nothing(kl: float) -> None:
    assert moved(CONTROL, 2.0, kl) == 2.0


def test_without_a_target_or_a_weight_it_stays() -> None:
    assert moved(Distill(target_kl=None), 2.0, 5.0) == 2.0
    assert moved(CONTROL, 0.0, 5.0) == 0.0


def test_the_loop_settles_where_the_kl_is_the_target() -> None:
    """Of a model whose KL falls with the weight, and answers a batch late."""
    weight, kl = 1.0, 0.8
    for _ in range(60):
        weight, kl = moved(CONTROL, weight, kl), 0.5 * kl + 0.5 * 0.4 / weight
    assert kl == pytest.approx(CONTROL.target_kl, rel=1e-3)
    assert weight == pytest.approx(4.0, rel=1e-3)
