"""Jackpot: acceptance, calibration over the step, limits, denominators."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck

from megatron_troll.config import ConfigError, ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.objectives.correction.jackpot import (
    accept_prob,
    correlation,
    importance,
    kl_of_sparse,
    log_accepted,
    moments,
)
from megatron_troll.types import LossTerms
from tests.unit.objectives.rows import Rows, sample, statistics_of

V, K = 12, 4


def objective(region: str = "none", **fields: object) -> Objective:
    slot = Slot.model_validate({"name": "jackpot", "k": K} | fields)
    return compose(ObjectiveConfig(trust_region=Slot(name=region), correction=slot))


def run(
    method: Objective, rows: Rows, micro_batches: Sequence[Sequence[int]] = (), **inputs: Any
) -> list[LossTerms]:
    """The terms of each micro-batch, given as the responses in it; by default one that has all."""
    parts = [rows.only(chosen) for chosen in micro_batches] or [rows]
    read = [replace(part.inputs(method), **inputs) for part in parts]
    statistics = statistics_of(method, read)
    return [method.loss(each, statistics) for each in read]


def plain_score(rows: Rows) -> Tensor:
    """r A [N]"""
    at = rows.target[:, None]
    log_ratio = (rows.new.log_softmax(1) - rows.old.log_softmax(1)).gather(1, at)[:, 0]
    return log_ratio.exp() * rows.advantage[rows.owner]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 4.0), st.floats(-3.0, 3.0))
def test_rejection_never_leads_away_from_the_target(seed, change, log_lam):
    """KL(p || post) <= KL(p || q); post sums to 1; the weights of accepted tokens give p back."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(5, V, generator=generator, dtype=torch.float64)
    p = (q + change * torch.randn(5, V, generator=generator, dtype=torch.float64)).log_softmax(1)
    q, lam = q.log_softmax(1), math.exp(log_lam)
    accepted = log_accepted(p, q, lam)
    z = accepted.exp().sum(1, keepdim=True)
    assert (kl_of_sparse(p, accepted - z.log()) <= kl_of_sparse(p, q) + 1e-12).all()
    assert torch.allclose(accepted.exp(), q.exp() * accept_prob(p, q, lam))
    assert torch.allclose(accepted.exp() * importance(p, q, lam), p.exp())


def test_lambda_to_zero_is_plain_importance_sampling():
    """Nothing is rejected and Z = 1 where all of V is stored: p / q times old / p, that is old / q."""
    rows = sample([6, 5], V, change=0.3)
    method = objective(lam=1e-6, k=V, c1=1e6, c2=1e6)
    (terms,) = run(method, replace(rows, uniform=torch.full((11,), 0.999, dtype=torch.float64)))
    at = rows.target[:, None]
    weight = (rows.old.log_softmax(1) - rows.mu.log_softmax(1)).gather(1, at)[:, 0].exp()
    assert terms.per_token["jackpot_accepted"].tolist() == [1] * 11
    assert torch.allclose(terms.per_token["correction_weight"], weight)
    assert torch.allclose(terms.per_token["objective"], weight * plain_score(rows).detach())


@pytest.mark.parametrize("target", ["new", "ref"])
def test_equal_policies_need_no_correction(target):
    rows = sample([6, 5], V)
    rows = replace(rows, old=rows.mu, new=rows.mu.clone().requires_grad_())
    (terms,) = run(objective(target=target, k=V), rows)
    assert torch.allclose(terms.per_token["correction_weight"], torch.ones(11, dtype=torch.float64))
    assert torch.allclose(terms.per_token["jackpot_kappa"], torch.ones(11, dtype=torch.float64))


@pytest.mark.parametrize("target", ["new", "ref"])
def test_the_weight_is_detached(target):
    """The gradient is that of the plain score, weighted."""
    rows = sample([6, 5], V, seed=1)
    (terms,) = run(objective(target=target, lam=2.0), rows)
    weight = terms.per_token["correction_weight"]
    assert 0 < (weight > 0).double().mean() < 1
    (mine,) = grad(-terms.loss, rows.new)
    (expected,) = grad((rows.weight * weight * plain_score(rows)).sum(), rows.new)
    assert torch.allclose(mine, expected)


def test_gradient_through_the_objective():
    rows, method = sample([3, 2], V, seed=2), objective(target="ref", lam=2.0)
    statistics = statistics_of(method, [rows.inputs(method)])

    def loss(new: Tensor) -> Tensor:
        return method.loss(replace(rows, new=new).inputs(method), statistics).loss

    assert gradcheck(loss, rows.new)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
@pytest.mark.parametrize("denominator", ["all", "accepted"])
def test_the_split_into_micro_batches_does_not_matter(denominator, aggregation):
    rows, method = sample([6, 1, 3, 5], V, seed=3), objective(denominator=denominator)
    (whole,) = run(method, rows, aggregation=aggregation)
    parts = run(method, rows, [[2], [0, 3], [1]], aggregation=aggregation)
    assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item())  # pyright: ignore
    kappas = torch.cat([part.per_token["jackpot_kappa"] for part in parts])
    assert torch.allclose(kappas, whole.per_token["jackpot_kappa"])


def test_masked_tokens_have_no_part_in_the_calibration():
    rows, method = sample([6, 5], V, seed=4), objective()
    masked = replace(rows, weight=torch.where(rows.owner == 0, rows.weight, 0.0))
    (first,), (second,) = run(method, masked), run(method, rows.only([0]))
    assert first.per_token["jackpot_kappa"][0] == second.per_token["jackpot_kappa"][0]
    assert torch.allclose(first.loss, second.loss)
    (gradient,) = grad(first.loss, rows.new)
    assert (gradient[6:] == 0).all()


def means_over_accepted(rows: Rows, aggregation: str, weights: list[float]) -> tuple[Tensor, Tensor]:
    """The objective with `denominator: accepted`, and the parts of the mean: x = rho score [N], mask [N]."""
    weight = torch.tensor(weights, dtype=torch.float64)[rows.owner]
    rows = replace(rows, weight=weight)
    (accepted,) = run(objective(denominator="accepted"), rows, aggregation=aggregation)
    (everything,) = run(objective(), rows, aggregation=aggregation)
    return -accepted.loss, torch.stack(
        [everything.per_token["objective"], everything.per_token["jackpot_accepted"]]
    )


def test_denominators():
    """Over accepted tokens: of the step, or of each response; L_max shrinks with the response's share. A
    response without an accepted token divides by one."""
    rows = sample([6, 1, 3, 5], V, change=1.0, seed=6)
    rows = replace(rows, uniform=torch.where(rows.owner == 2, 1.0, rows.uniform))
    value, (x, mask) = means_over_accepted(rows, "token-mean", [1 / 15] * 4)
    assert value.item() == pytest.approx((x.sum() / mask.sum()).item())

    per_response = [(x[rows.owner == i].sum(), mask[rows.owner == i].sum()) for i in range(4)]
    assert per_response[2][1] == 0
    expected = sum(total / max(count, 1) for total, count in per_response) / 4
    value, _ = means_over_accepted(rows, "seq-mean-token-mean", [1 / (4 * n) for n in (6, 1, 3, 5)])
    assert value.item() == pytest.approx(float(expected))

    expected = sum(
        total / (8 * max(count, 1) / n) for (total, count), n in zip(per_response, (6, 1, 3, 5))
    ) / 4  # fmt: skip
    value, _ = means_over_accepted(rows, "seq-mean-token-sum-norm", [1 / (4 * 8)] * 4)
    assert value.item() == pytest.approx(float(expected))


def test_without_z_the_weights_are_the_exact_correction():
    """Over tokens drawn from q and uniforms, the mean of the weighted f is sum p f (5.1), whatever k."""
    n = 20_000
    rows = sample([1, 1], V, change=0.7, seed=7)
    at = torch.zeros(n, dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)
    many = replace(
        rows,
        **{name: getattr(rows, name).detach()[at] for name in ("new", "old", "mu", "reference")},
        target=torch.multinomial(rows.mu[0].softmax(0), n, replacement=True, generator=generator),
        weight=torch.full((n,), 1 / n, dtype=torch.float64),
        uniform=torch.rand(n, generator=generator, dtype=torch.float64),
        owner=at,
    )
    (terms,) = run(objective(use_z=False, c1=1e6, target="ref"), many)
    f = torch.arange(V, dtype=torch.float64)
    weighted = terms.per_token["correction_weight"] * f[many.target]
    error = 4 * weighted.std() / math.sqrt(n)
    assert weighted.mean() == pytest.approx((rows.old[0].softmax(0) * f).sum().item(), abs=error.item())


def test_kappa_repairs_the_mean_of_z_and_is_clamped():
    rows = sample([40, 40], V, change=0.5, seed=8)
    (terms,) = run(objective(clamp=False, k=1), rows)
    z, accept = (terms.per_token[f"jackpot_{name}"] for name in ("z", "accept_prob"))
    assert torch.allclose(z.mean(), accept.mean())
    assert terms.per_token["jackpot_kappa_clamped"].sum() == 0
    (limited,) = run(objective(k=1), rows)
    assert (limited.per_token["jackpot_z"] <= 1).all()
    rows.new.data[:] = rows.mu
    rows.new.data[torch.arange(80), rows.mu.argmax(1)] -= 9.0  # the one stored token is hardly wanted
    (limited,) = run(objective(k=1), rows)
    assert limited.per_token["jackpot_kappa"].unique().tolist() == [4.0]
    assert limited.per_token["jackpot_kappa_clamped"].all()


def test_what_is_reported():
    rows, method = sample([6, 5], V, seed=9), objective(c1=1.1, c2=0.9)
    (terms,) = run(method, rows)
    per_token = terms.per_token
    assert per_token.keys() <= method.diagnostics.keys()
    assert all(value.shape == (11,) and not value.requires_grad for value in per_token.values())
    accepted = per_token["jackpot_accepted"]
    assert torch.equal(accepted.bool(), rows.uniform < per_token["jackpot_accept_prob"])
    share = per_token["jackpot_response_acceptance"]
    assert share[[0, 6]].tolist() == pytest.approx([accepted[:6].mean().item(), accepted[6:].mean().item()])
    assert share.isnan().sum() == 9
    a, z = per_token["jackpot_accept_prob"], per_token["jackpot_z_approx"]
    expected = torch.corrcoef(torch.stack([a, z]))[0, 1]
    assert torch.allclose(per_token["jackpot_z_accept_correlation"][0], expected)
    assert (per_token["jackpot_kl_post"] < per_token["jackpot_kl_rollout"]).double().mean() > 0.5
    at = rows.target[:, None]
    new, old = (logits.log_softmax(1).gather(1, at)[:, 0] for logits in (rows.new, rows.old))
    assert torch.equal(per_token["jackpot_back_truncated"].bool(), (old - new).exp() > 0.9)
    assert 0 < per_token["jackpot_weight_truncated"].sum() < 11


def test_correlation_of_constants_is_undefined():
    x, counted = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 0.0])
    assert correlation(moments(x, 3 - 2 * x, counted)).item() == pytest.approx(-1.0)
    assert correlation(moments(x, torch.ones(3), counted)).isnan()


def test_the_regression_of_troll_is_neither_masked_nor_weighed():
    rows = sample([6, 5], V, change=2.0, seed=10)
    rows = replace(rows, advantage=torch.zeros(2, dtype=torch.float64))
    (corrected,) = run(objective("troll"), rows)
    plain = compose(ObjectiveConfig(trust_region=Slot(name="troll")))
    assert corrected.loss.item() > 1e-3
    assert torch.allclose(corrected.loss, plain.loss(rows.inputs(plain)).loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lam": 0.0}, "objective.correction.lam: got 0.0, expected a number > 0"),
        ({"c1": -1.0}, "objective.correction.c1: got -1.0, expected a number > 0"),
        ({"k": 0}, "objective.correction.k: got 0, expected an integer >= 1"),
        ({"target": "rollout"}, "objective.correction.target: .*one of new, ref"),
        ({"denominator": "accepted", "use_z": False}, "only with use_z: true"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        objective(**fields)


def test_bad_inputs_are_refused():
    rows, method = sample([2, 2], V), objective()
    inputs = rows.inputs(method)
    statistics = method.statistics(inputs)
    with pytest.raises(ValueError, match="statistics of the whole optimizer step"):
        method.loss(inputs)
    with pytest.raises(ValueError, match=r"objective\.correction reads the rollout .*: raise rollout\.top_k"):
        method.loss(replace(inputs, rollout_topk=None), statistics)
    with pytest.raises(ValueError, match=r"keeps the top 2 tokens; k=4 needs more: raise rollout\.top_k"):
        method.statistics(rows.inputs(method, rollout_k=2))
    with pytest.raises(ValueError, match="new policy at the rollout engine's ids"):
        method.loss(replace(inputs, new=replace(inputs.new, at_rollout=None)), statistics)
    with pytest.raises(ValueError, match="must know the aggregation"):
        objective(denominator="accepted").loss(replace(inputs, aggregation=None), statistics)
