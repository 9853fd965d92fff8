"""CPPO, DPPO and TRM."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, budget, compose
from megatron_troll.objectives.trust_region.cppo import Cppo
from megatron_troll.types import HeadOutputs, LossTerms
from tests.unit.golden.records import one_response
from tests.unit.objectives.rows import Rows, gradient, sample, slope, statistics_of

KINDS = ("binary_tv", "binary_kl", "topk_tv", "topk_kl")
METHODS = ("cppo", "dppo", "trm")


def objective(name: str, **fields: object) -> Objective:
    if name == "trm" and str(fields.get("divergence")).endswith("tv"):
        fields = {"delta": 0.1} | fields
    return compose(ObjectiveConfig(trust_region=Slot.model_validate({"name": name} | fields)))


def terms(method: Objective, rows: Rows) -> LossTerms:
    inputs = rows.inputs(method)
    return method.loss(inputs, statistics_of(method, [inputs]))


def kept(method: Objective, rows: Rows) -> Tensor:
    return terms(method, rows).per_token["masked"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", METHODS)
def test_gradient_against_differences_with_mask_and_weight_held(name, kind):
    """J = sum weight M min(rho, cap) A log pi, where only log pi moves."""
    rows = sample([4, 3], vocab=6, change=1.0)
    bound = {"delta": 0.01} if name == "dppo" else {}
    method = objective(name, divergence=kind, k=3, cap=1.5, **bound)
    mask = kept(method, rows).double()
    assert 0 < mask.mean() < 1 or name == "trm"
    at = rows.target[:, None]
    rho = (rows.new.log_softmax(1) - rows.mu.log_softmax(1)).gather(1, at)[:, 0].exp().detach()
    coefficient = rows.weight * mask * rho.clamp(max=1.5) * rows.advantage[rows.owner]

    def value(logits: Tensor) -> Tensor:
        return (coefficient * logits.log_softmax(1).gather(1, at)[:, 0]).sum()

    assert torch.allclose(gradient(method, rows), slope(value, rows.new), atol=1e-8)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(KINDS), st.sampled_from(METHODS), st.floats(0.0, 0.5))
def test_a_wider_bound_keeps_what_a_tighter_one_keeps(seed, kind, name, delta):
    rows = sample([5, 2, 4, 6], seed=seed)
    tight = kept(objective(name, divergence=kind, delta=delta), rows)
    wide = kept(objective(name, divergence=kind, delta=1.3 * delta + 0.01), rows)
    assert (tight <= wide).all()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.sampled_from(KINDS))
def test_cppo_without_weights_and_budget_is_dppo(seed, kind):
    """But where A = 0: DPPO rejects a lower ratio there, CPPO nothing."""
    rows = sample([5, 2, 4, 3], seed=seed)
    rows = replace(rows, advantage=torch.cat((rows.advantage[:2], torch.zeros(2, dtype=torch.float64))))
    plain = objective("cppo", divergence=kind, delta=0.1, weights="uniform", use_budget=False)
    dppo = objective("dppo", divergence=kind, delta=0.1)
    counts = rows.owner < 2
    assert torch.equal(kept(plain, rows)[counts], kept(dppo, rows)[counts])
    assert kept(plain, rows)[~counts].all()
    assert torch.allclose(gradient(plain, rows), gradient(dppo, rows))


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10_000), st.integers(1, 12), st.booleans())
def test_cppo_against_the_recursion(seed, t_ref, fixed):
    """ALGORITHMS 2 token by token, over responses of different length in one batch."""
    rows = sample([5, 0, 1, 7], seed=seed)
    method = objective("cppo", delta=0.2, delta_b=0.05, w_min=0.5, t_ref=t_ref if fixed else None)
    found = terms(method, rows).per_token
    for r, length in ((0, 5), (2, 1), (3, 7)):
        spent = weights = 0.0
        horizon = t_ref if fixed else length
        tokens = (rows.owner == r).nonzero()[:, 0].tolist()
        for t, i in enumerate(tokens):
            w = 1.0 if horizon == 1 else 1 - 0.5 * min(t / (horizon - 1), 1.0)
            c = min(0.2, 0.2 + 0.05 * weights - spent)
            charge = w * found["divergence"][i].item()
            rho = (rows.new[i].log_softmax(0) - rows.mu[i].log_softmax(0))[rows.target[i]].exp()
            inward = rows.advantage[r] * (rho - 1) <= 0
            assert bool(found["masked"][i]) == (not inward and charge > c)
            assert bool(found["masked_by_weight"][i]) == (not inward and charge > c and charge > 0.2)
            assert found["threshold"][i].item() == pytest.approx(c)
            spent, weights = spent + charge, weights + w
        assert found["response_divergence"][tokens[-1]].item() == pytest.approx(spent / weights)


def test_masks_from_the_old_policy_see_what_masks_from_the_rollout_see():
    rows = sample([6, 4])
    same = replace(rows, old=rows.mu)
    for name, kind in ((name, kind) for name in METHODS for kind in KINDS):
        rollout = objective(name, divergence=kind, k=5)
        old = objective(name, divergence=kind, k=5, against="old")
        assert old.rollout_k == 0
        first, second = terms(rollout, same).per_token, terms(old, same).per_token
        assert torch.allclose(first["divergence"], second["divergence"])
        assert torch.equal(first["masked"], second["masked"])


def test_the_engine_may_keep_more_than_k():
    rows, method = sample([6, 4]), objective("dppo", divergence="topk_kl", k=3)
    few, many = (method.loss(rows.inputs(method, k)).per_token["divergence"] for k in (3, 11))
    assert torch.allclose(few, many)


@pytest.mark.parametrize("over", ["max", "avg"])
def test_trm_keeps_or_masks_whole_responses(over):
    rows = sample([5, 3, 0, 4])
    found = terms(objective("trm", over=over, delta=0.0), rows).per_token["divergence"]
    measure = [found[rows.owner == r] for r in (0, 1, 3)]
    levels = [float(d.max() if over == "max" else d.mean()) for d in measure]
    second = sorted(levels)[1]
    per_token = terms(objective("trm", over=over, delta=second * (1 + 1e-9)), rows).per_token
    whole = dict(zip((0, 1, 3), levels))
    assert per_token["masked"].tolist() == [float(whole[r] > second) for r in rows.owner.tolist()]
    assert per_token["responses_masked"].nanmean().item() == pytest.approx(1 / 3)


def test_shuffled_weights_are_the_schedule_elsewhere():
    rows = sample([8, 5])
    shuffled, schedule = (objective("cppo", weights=w).trust_region for w in ("shuffled", "schedule"))
    inputs = rows.inputs(objective("cppo"))
    a, b = (m.accounts(torch.zeros(13).double(), inputs, 0.02).weight for m in (shuffled, schedule))  # pyright: ignore[reportAttributeAccessIssue]
    assert not torch.equal(a, b)
    for r in (0, 1):
        assert a[rows.owner == r].sort().values.tolist() == b[rows.owner == r].sort().values.tolist()
        alone = rows.only([r]).inputs(objective("cppo"))
        again = shuffled.accounts(torch.zeros(len(alone.weight)).double(), alone, 0.02).weight  # pyright: ignore[reportAttributeAccessIssue]
        assert torch.equal(again, a[rows.owner == r])


def test_the_soft_gate_scales_where_the_hard_one_rejects():
    rows = sample([9, 7], change=1.0)
    hard, soft = objective("cppo"), objective("cppo", gate_shape="soft")
    rejected = ~kept(hard, rows)
    assert rejected.any()
    a, b = (terms(m, rows).per_token["objective"] for m in (hard, soft))
    assert torch.equal(a[~rejected], b[~rejected])
    assert (a[rejected] == 0).all()
    assert (b[rejected] != 0).all()


@pytest.mark.parametrize("use_budget", [True, False])
def test_the_soft_gate_is_one_over_the_larger_violation(use_budget):
    """Eq. 19, 20 token by token; the last one has not moved at all, and only the budget holds it back."""
    spent, total, expected = 0.0, 0.0, []
    divergence = [0.1, 0.3, 0.05, 0.6, 0.0]
    for t, d in enumerate(divergence):
        weight = 1 - 0.2 * t / 4
        allowed = 0.15 + 0.02 * total
        spent, total = spent + weight * d, total + weight
        violation = max(weight * d / 0.15, spent / allowed if use_budget else 0.0)
        expected.append(min(1.0, 1 / max(violation, 1e-9)))
    method = Cppo(gate_shape="soft", use_budget=use_budget)
    nothing, outward = HeadOutputs(None, None, None), torch.ones(5, dtype=torch.float64)
    inputs = one_response(nothing, nothing, outward, outward)
    gate = method.gate(torch.tensor(divergence, dtype=torch.float64), outward, inputs, None).value
    assert gate.tolist() == pytest.approx(expected)
    assert (expected[-1] < 1) == use_budget


def test_position_deciles_and_clauses_add_up():
    rows = sample([25, 9], change=1.0)
    found = terms(objective("cppo"), rows).per_token
    split = torch.stack([found[f"masked_decile_{i}"] for i in range(10)])
    assert torch.equal((~split.isnan()).sum(0), torch.ones(34, dtype=torch.int64))
    assert torch.equal(split.nan_to_num(0.0).sum(0), found["masked"])
    assert torch.equal(found["masked_by_weight"] + found["masked_by_budget"], found["masked"])
    first = [i for i in range(10) if not split[i, 0].isnan()]
    assert first == [0]


def test_an_overspent_budget_rejects_even_no_divergence():
    threshold = budget.raw_thresholds(
        torch.tensor([0.9, 0.0]), torch.ones(2, dtype=torch.float64), torch.zeros(2).long(), 0.15, 0.02
    )
    assert threshold[1] < 0


def test_what_is_missing_is_named():
    rows, method = sample([2, 2]), objective("cppo")
    inputs = rows.inputs(method)
    with pytest.raises(ValueError, match="the rollout policy's top-K record; none was given"):
        method.loss(replace(inputs, rollout_topk=None))
    with pytest.raises(ValueError, match="the rollout record keeps the top 5 tokens; k=20 needs more"):
        method.loss(rows.inputs(method, 5))
    with pytest.raises(ValueError, match="it was not read there"):
        method.loss(replace(inputs, new=replace(inputs.new, at_rollout=None)))
