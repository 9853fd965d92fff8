"""Seconds go to the phase that is on; a nested phase is not counted twice."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from megatron_troll.observe.phases import ModelCost, Pace, Phases, mfu, peak_tflops


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_phases_add_up_and_start_anew() -> None:
    clock = Clock()
    phases = Phases(clock=clock)
    for _ in range(2):
        with phases("generation"):
            clock.now += 3
    with phases("forward_backward"):
        clock.now += 1
        with phases("optimizer"):
            clock.now += 5
        clock.now += 1
    assert phases.take() == {
        "seconds/generation": 6,
        "seconds/forward_backward": 2,
        "seconds/optimizer": 5,
    }
    assert phases.take() == {}


def test_a_phase_that_fails_is_still_counted() -> None:
    clock = Clock()
    phases = Phases(clock=clock)

    def fail() -> None:
        clock.now += 2
        raise KeyError

    with pytest.raises(KeyError), phases("reward"):
        fail()
    assert phases.take() == {"seconds/reward": 2}


def test_queued_work_is_charged_to_its_phase() -> None:
    clock = Clock()
    queued = [0.0]

    def synchronize() -> None:
        clock.now += queued.pop() if queued else 0.0

    phases = Phases(clock=clock, synchronize=synchronize)
    with phases("old_policy"):
        queued.append(4.0)
    assert phases.take() == {"seconds/old_policy": 4}


def test_listeners_are_entered_with_the_name() -> None:
    heard: list[str] = []

    @contextmanager
    def listener(name: str) -> Iterator[None]:
        heard.append(f"+{name}")
        yield
        heard.append(f"-{name}")

    with Phases(listener)("generation"):
        heard.append("work")
    assert heard == ["+generation", "work", "-generation"]


def test_eta_is_the_median_step_times_the_steps_left() -> None:
    pace = Pace(steps=10)
    assert pace.eta(1, 100.0) == 900
    pace.eta(2, 2.0)
    assert pace.eta(3, 2.0) == 14
    assert pace.eta(10, 2.0) == 0


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA GeForce RTX 4090", None),
        (None, None),
    ],
)
def test_peaks_by_device_name(device: str | None, tflops: float | None) -> None:
    assert peak_tflops(device, override=None) == tflops
    assert peak_tflops(device, override=100.0) == 100.0


def test_mfu_of_a_dense_layer() -> None:
    cost = ModelCost(parameters=1_000_000, attention=0)
    flops = cost.flops(forward_tokens=0, trained_tokens=1000, mean_context=0)
    assert flops == 6e9
    assert mfu(flops, seconds=2.0, devices=2, peak=0.003) == pytest.approx(0.5)


def test_attention_scores_and_values_cost_two_products_each() -> None:
    layers, heads, width, context = 2, 4, 16, 100
    cost = ModelCost(parameters=0, attention=layers * heads * width)
    by_hand = layers * heads * (2 * width * context + 2 * width * context)
    assert cost.flops(forward_tokens=1, trained_tokens=0, mean_context=context) == by_hand
