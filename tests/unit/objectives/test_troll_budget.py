"""TROLL with the bound of CPPO's budget."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.objectives.trust_region.troll import Budget
from megatron_troll.types import HeadOutputs
from tests.unit.golden.records import one_response
from tests.unit.objectives.rows import sample


def objective(**bound: object) -> Objective:
    budget = {"from": "cppo"} | bound
    return compose(ObjectiveConfig(trust_region=Slot.model_validate({"name": "troll", "bound": budget})))


@settings(deadline=None)
@given(
    st.lists(st.floats(0.0, 0.5) | st.just(float("inf")), min_size=1, max_size=20),
    st.floats(0.0, 0.3),
    st.floats(0.0, 0.1),
    st.floats(0.1, 1.0),
    st.sampled_from(["projected", "raw"]),
)
def test_bounds_against_the_recursion(kl, delta, delta_b, w_min, accumulate):
    bound = Budget.model_validate(
        {"from": "cppo", "delta": delta, "delta_b": delta_b, "w_min": w_min, "accumulate": accumulate}
    )
    d = torch.tensor(kl, dtype=torch.float64)
    nothing = HeadOutputs(None, None, None)
    found = bound.bounds(d, one_response(nothing, nothing, d, torch.ones_like(d)))
    spent = weights = 0.0
    for t, x in enumerate(kl):
        w = 1 - (1 - w_min) * t / max(len(kl) - 1, 1)
        eps = max(min(delta, delta + delta_b * weights - spent), 0.0) / w
        assert found[t].item() == pytest.approx(eps, rel=1e-9, abs=1e-12)
        spent += w * (min(x, eps) if accumulate == "projected" else x)
        weights += w


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.floats(0.001, 0.3), st.floats(0.0, 0.05))
@example(0, 0.2, 0.03)
def test_the_projection_keeps_within_the_budget(seed, delta, delta_b):
    rows = sample([6, 1, 0, 4], seed=seed)
    method = objective(delta=delta, delta_b=delta_b, w_min=1.0)
    found = method.loss(rows.inputs(method)).per_token
    assert (found["kl_after"] <= found["bound"] * (1 + 1e-6) + 1e-12).all()
    for r in (0, 1, 3):
        spent = found["kl_after"][rows.owner == r].cumsum(0)
        steps = torch.arange(len(spent))
        assert (spent <= (delta + delta_b * steps) * (1 + 1e-6) + 1e-9).all()


def test_a_budget_without_end_is_no_bound():
    rows = sample([6, 4])
    free, constant = (
        objective(delta=1e6),
        compose(ObjectiveConfig(trust_region=Slot.model_validate({"name": "troll", "bound": 1e6}))),
    )
    assert torch.equal(free.loss(rows.inputs(free)).loss, constant.loss(rows.inputs(constant)).loss)


def test_responses_do_not_pay_for_one_another():
    rows = sample([6, 4], change=1.0)
    method = objective(accumulate="raw")
    both = method.loss(rows.inputs(method)).per_token["bound"]
    alone = method.loss(rows.only([1]).inputs(method)).per_token["bound"]
    assert torch.equal(both[6:], alone)
