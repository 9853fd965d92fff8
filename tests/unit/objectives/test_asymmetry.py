"""Asym under every kind of weight, against numpy's variance of numbers made in another way."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.objectives.asymmetry import asymmetry, totals_of
from tests.unit.objectives.rows import Rows, sample, statistics_of

LENGTHS = [4, 3, 0, 5, 6, 2]


def objective(ratio: str, region: dict) -> Objective:
    return compose(ObjectiveConfig(ratio=Slot(name=ratio), trust_region=Slot.model_validate(region)))


def measured(method: Objective, rows: Rows, parts: list[list[int]]) -> float | None:
    """From micro-batches of these responses."""
    inputs = [rows.only(part).inputs(method) for part in parts]
    statistics = statistics_of(method, inputs)
    found = [(method.loss(one, statistics).pulls, one) for one in inputs]
    return asymmetry(torch.stack([totals_of(pulls, one) for pulls, one in found]).sum(0))


def spread(rows: Rows, weight: list[float]) -> float:
    """The mean over groups of the variance of w A, where a response without tokens has none."""
    value = np.array(weight) * rows.advantage.numpy()
    told = [[i for i in (2 * g, 2 * g + 1) if LENGTHS[i]] for g in range(3)]
    return float(np.mean([np.var(value[group]) for group in told if len(group) > 1]))


def ratios(rows: Rows) -> list[Tensor]:
    """The ratios of the tokens of each response."""
    logp = [
        logits.detach().log_softmax(1).gather(1, rows.target[:, None])[:, 0]
        for logits in (rows.new, rows.old)
    ]
    return [(logp[0] - logp[1])[rows.owner == i].exp() for i in range(len(LENGTHS))]


def clipped(ratio: float, advantage: float, low: float, high: float) -> float:
    return min(ratio, 1 + high) if advantage >= 0 else max(ratio, 1 - low)


SPLITS = [[[0, 1, 2, 3, 4, 5]], [[0, 2, 5], [1, 4], [3]]]


@pytest.mark.parametrize("parts", SPLITS)
def test_of_grpo_and_gspo(parts: list[list[int]]) -> None:
    """The weight of a response under GRPO is the mean of its clipped ratios, under GSPO its clipped s."""
    rows = sample(LENGTHS, change=0.6)
    a = rows.advantage.tolist()
    grpo = [
        float(np.mean([clipped(r, a[i], 0.2, 0.2) for r in each.tolist()])) if len(each) else 0.0
        for i, each in enumerate(ratios(rows))
    ]
    gspo = [
        clipped(float(each.log().mean().exp()), a[i], 0.1, 0.2) if len(each) else 0.0
        for i, each in enumerate(ratios(rows))
    ]
    token, sequence = objective("token", {"name": "clip"}), {"name": "clip", "eps_low": 0.1, "eps_high": 0.2}
    assert measured(token, rows, parts) == pytest.approx(spread(rows, grpo))
    assert measured(objective("gspo", sequence), rows, parts) == pytest.approx(spread(rows, gspo))


@pytest.mark.parametrize("parts", SPLITS)
def test_min_replace_leaves_only_the_spread_of_the_advantages(parts: list[list[int]]) -> None:
    rows, bounds = sample(LENGTHS, change=0.6), {"name": "clip", "eps_low": 0.1, "eps_high": 0.2}
    method = compose(
        ObjectiveConfig(
            ratio=Slot.model_validate({"name": "dfpo", "transform": "min"}),
            trust_region=Slot.model_validate(bounds),
        )
    )
    a = rows.advantage.tolist()
    s = [float(each.log().mean().exp()) if len(each) else 1.0 for each in ratios(rows)]
    bar = [clipped(r, a[i], 0.1, 0.2) for i, r in enumerate(s)]
    least = [min(bar[i - i % 2], bar[i - i % 2 + 1]) for i in range(len(bar))]
    assert measured(method, rows, parts) == pytest.approx(spread(rows, least))


@pytest.mark.parametrize("region", [{"name": "dppo", "delta": 0.02}, {"name": "cispo", "eps_high": 0.1}])
def test_of_methods_whose_weight_multiplies_log_pi(region: dict) -> None:
    """Their weight is what the gradient has, token by token."""
    rows = sample(LENGTHS, change=0.6)
    method = objective("token", region)
    inputs = rows.inputs(method)
    (slope,) = torch.autograd.grad(method.loss(inputs).loss, rows.new)
    at = rows.target[:, None]
    towards = 1 - rows.new.detach().softmax(1).gather(1, at)[:, 0]
    pull = -slope.gather(1, at)[:, 0] / towards / rows.weight
    each = [
        float(pull[rows.owner == i].mean()) / rows.advantage[i].item()
        for i in range(len(LENGTHS))
        if LENGTHS[i]
    ]
    each.insert(2, 0.0)
    assert measured(method, rows, SPLITS[0]) == pytest.approx(spread(rows, each))


def test_without_groups_there_is_none() -> None:
    rows, method = sample(LENGTHS), objective("token", {"name": "clip"})
    inputs = replace(rows.inputs(method), response_advantage=None)
    assert method.loss(inputs).pulls is None
    assert asymmetry(totals_of(None, inputs)) is None
    assert measured(method, rows, [[0], [3]]) is None
