"""CPPO's adaptive budgets: the paper's, of each response (eq. 22), and ours, of the whole step."""

import statistics
from dataclasses import replace
from itertools import accumulate
from math import inf

import pytest
import torch
from torch import Tensor

from megatron_troll.config import ConfigError, ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, budget, compose
from megatron_troll.types import LossTerms
from tests.unit.objectives.rows import Rows, gradient, sample, statistics_of

DELTA, W_MIN, K = 0.15, 0.8, 3


def objective(**fields: object) -> Objective:
    return compose(ObjectiveConfig(trust_region=Slot.model_validate({"name": "cppo"} | fields)))


def terms(method: Objective, rows: Rows) -> LossTerms:
    inputs = rows.inputs(method)
    return method.loss(inputs, statistics_of(method, [inputs]))


def p90(values: list[float]) -> float:
    """By the standard library; "inclusive" is linear between the sorted values."""
    return statistics.quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def distance(mu: Tensor, pi: Tensor, sampled: int) -> float:
    """TV over {top-3 of mu, sampled token, all others}, from whole rows of logits [V]."""
    p, q = mu.softmax(0).tolist(), pi.softmax(0).tolist()
    kept = {*sorted(range(len(p)), key=lambda v: -p[v])[:K], sampled}
    rest = abs(sum(p[v] - q[v] for v in range(len(p)) if v not in kept))
    return (sum(abs(p[v] - q[v]) for v in kept) + rest) / 2


def by_the_paper(rows: Rows, response: int, b: float) -> tuple[list[float], float]:
    """M_t rho_t A of every token, and delta_b^seq. Written from Algorithm 1 with eq. 8, 9, 11 and 22: the two
    conditions of the mask, not one threshold."""
    at = (rows.owner == response).nonzero()[:, 0].tolist()
    moved = [distance(rows.mu[i], rows.new[i].detach(), int(rows.target[i])) for i in at]
    delta_b = min(2 * b, max(b, p90(moved)))
    last = max(len(at) - 1, 1)
    weight = [1 - (1 - W_MIN) * t / last for t in range(len(at))]
    spent = list(accumulate(w * d for w, d in zip(weight, moved)))
    found, advantage = [], rows.advantage[response].item()
    for t, i in enumerate(at):
        rho = (rows.new[i].softmax(0) / rows.mu[i].softmax(0))[rows.target[i]].item()
        within = weight[t] * moved[t] <= DELTA and spent[t] <= DELTA + delta_b * sum(weight[:t])
        found.append(rho * advantage if within or advantage * (rho - 1) <= 0 else 0.0)
    return found, delta_b


LENGTHS = [40, 1, 0, 7, 2, 23, 12, 5]
# How far each response has moved.
FAR = torch.tensor([1.0, 1.0, 1.0, 0.3, 1.5, 0.5, 0.08, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("seed", range(4))
def test_against_a_plain_loop_from_the_paper(seed: int) -> None:
    """Responses of 1 to 40 tokens, and an empty one, in one batch; the gradient of each token is that of
    M rho A log pi. Some responses have b, some 2 b, and some their percentile."""
    drawn = sample(LENGTHS, vocab=9, change=0.25, seed=seed)
    new = drawn.mu + FAR[drawn.owner][:, None] * (drawn.new.detach() - drawn.mu)
    rows, b = replace(drawn, new=new.requires_grad_()), 0.03
    method = objective(k=K, delta=DELTA, w_min=W_MIN, delta_b_min=b)
    assert not method.needs_statistics
    per_token, slope = terms(method, rows).per_token, gradient(method, rows)
    used = []
    for r in (r for r, length in enumerate(LENGTHS) if length):
        coefficient, delta_b = by_the_paper(rows, r, b)
        own = rows.owner == r
        found = per_token["delta_b"][own]
        assert found.tolist() == pytest.approx([delta_b] * LENGTHS[r], rel=1e-12)
        towards = torch.eye(9).double()[rows.target[own]] - rows.new[own].softmax(1).detach()
        scale = rows.weight[own] * torch.tensor(coefficient, dtype=torch.float64)
        assert torch.allclose(slope[own], scale[:, None] * towards, rtol=0, atol=1e-14)
        alone = terms(method, rows.only([r])).per_token["delta_b"]
        assert torch.equal(alone, found)
        used.append(delta_b)
    assert min(used) == b
    assert max(used) == 2 * b
    assert any(b < delta_b < 2 * b for delta_b in used)
    assert per_token["masked_by_budget"].any()


@pytest.mark.parametrize("b", [0.01, 0.02, 0.3])
def test_by_hand(b: float) -> None:
    """P90 of .00, .01, ..., .10 is .09; of ten values .01 to .10 it is .091."""
    eleven = torch.arange(11).double() / 100
    values = torch.cat((eleven, eleven[1:].flip(0)))
    owner = torch.tensor([0] * 11 + [2] * 10)
    found = budget.quantile(values, owner, 0.9)
    assert found.tolist() == pytest.approx([0.09] * 11 + [0.091] * 10)
    assert found.clamp(b, 2 * b)[0].item() == pytest.approx(min(2 * b, max(b, 0.09)))


def test_infinite_divergences_have_a_quantile() -> None:
    """A KL is infinite where the new policy has lost a token."""
    values = torch.tensor([0.0, inf, inf, 0.1, 0.2, inf]).double()
    found = budget.quantile(values, torch.tensor([0, 0, 0, 1, 1, 1]), 0.9)
    assert found.tolist() == [inf] * 6


def test_one_value_for_the_step_is_a_quantile_within_its_limits() -> None:
    rows = sample([5, 3, 2, 4, 6, 1, 1, 3, 2, 5], change=0.2)
    mean = terms(objective(), rows).per_token["response_divergence"]
    wanted = mean[~mean.isnan()].quantile(0.9)
    for b, expected in ((wanted / 3, wanted), (wanted / 8, wanted / 2), (wanted, 2 * wanted)):
        used = terms(objective(delta_b_step=float(b)), rows).per_token["delta_b"]
        assert torch.allclose(used, expected)
    method = objective(delta_b_step=0.01)
    with pytest.raises(ValueError, match="needs the statistics of the step"):
        method.loss(rows.inputs(method))


@pytest.mark.parametrize("rule", ["delta_b_min", "delta_b_step"])
def test_an_adaptive_budget_needs_a_budget(rule: str) -> None:
    with pytest.raises(ConfigError, match=f"use_budget: false needs {rule}: null"):
        objective(**{rule: 0.01}, use_budget=False)


def test_two_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="two rules for one delta_b"):
        objective(delta_b_min=0.02, delta_b_step=0.01)
