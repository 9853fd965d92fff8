"""GRPO-fix, CISPO and MinPRO."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from tests.unit.objectives.rows import Rows, gradient, sample, slope


def objective(name: str, **fields: object) -> Objective:
    return compose(ObjectiveConfig(trust_region=Slot.model_validate({"name": name} | fields)))


def ratios(rows: Rows, logits: Tensor) -> Tensor:
    at = rows.target[:, None]
    return (logits.log_softmax(1) - rows.old.log_softmax(1)).gather(1, at)[:, 0].exp()


def weighted_log_probs(rows: Rows, weight: Tensor) -> Tensor:
    """d/d logits of sum weight A log pi, the weight held."""
    held = (rows.weight * weight * rows.advantage[rows.owner]).detach()
    return slope(
        lambda logits: (held * logits.log_softmax(1).gather(1, rows.target[:, None])[:, 0]).sum(), rows.new
    )


def test_symclip_gradients():
    rows = sample([4, 3], vocab=6, change=1.0)

    def value(logits: Tensor) -> Tensor:
        return (rows.weight * ratios(rows, logits).clamp(0.0, 1.2) * rows.advantage[rows.owner]).sum()

    assert torch.allclose(gradient(objective("symclip"), rows), slope(value, rows.new), atol=1e-8)
    weight = ratios(rows, rows.new).clamp(0.0, 1.2)
    assert torch.allclose(
        gradient(objective("symclip", grad="weight"), rows), weighted_log_probs(rows, weight), atol=1e-8
    )


@settings(deadline=None)
@given(st.floats(0.01, 10.0), st.sampled_from(["clip", "weight"]), st.floats(0.0, 1.0))
def test_symclip_cancels_opposite_advantages_of_one_ratio(ratio, grad, eps):
    method = objective("symclip", grad=grad, eps=eps)
    rows = sample([1, 1], vocab=3)
    logits = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    moved = logits.clone()
    moved[0, 0] += ratio
    both = Rows(**{
        **vars(rows), "new": moved.expand(2, 3).clone().requires_grad_(), "old": logits.expand(2, 3),
        "target": torch.zeros(2).long(), "advantage": torch.tensor([1.0, -1.0], dtype=torch.float64),
    })  # fmt: skip
    assert gradient(method, both).sum(0).abs().max() < 1e-12


def test_cispo_gradient_and_limits():
    rows = sample([4, 3], vocab=6, change=1.0)
    weight = ratios(rows, rows.new).clamp(0.7, 1.3)
    clipped = objective("cispo", eps_low=0.3, eps_high=0.3)
    assert torch.allclose(gradient(clipped, rows), weighted_log_probs(rows, weight), atol=1e-8)
    unlimited = objective("cispo", eps_high=1e9)
    assert torch.allclose(gradient(unlimited, rows), gradient(objective("none"), rows), atol=1e-12)


def test_minpro_weighs_by_the_smallest_ratio_before():
    rows = sample([5, 0, 1, 4], vocab=6, change=1.0)
    r = ratios(rows, rows.new).detach()
    expected = torch.empty_like(r)
    for response in range(4):
        lowest = 1.0
        for i in (rows.owner == response).nonzero()[:, 0].tolist():
            expected[i], lowest = (
                r[i] * lowest,
                min(float(r[i]), lowest if i and rows.owner[i - 1] == response else torch.inf),
            )
    method = objective("minpro", eps_high=0.5)
    assert torch.allclose(
        gradient(method, rows), weighted_log_probs(rows, expected.clamp(max=1.5)), atol=1e-8
    )


def test_minpro_of_one_token_responses_is_cispo():
    rows = sample([1, 1, 1, 1], change=1.0)
    assert torch.allclose(gradient(objective("minpro"), rows), gradient(objective("cispo"), rows))


@pytest.mark.parametrize("name", ["symclip", "cispo", "minpro"])
def test_clipped_tokens_are_reported(name):
    rows = sample([20, 20], change=2.0)
    bound = {"eps" if name == "symclip" else "eps_high": 0.1}
    method = objective(name, **bound)
    clipped = method.loss(rows.inputs(method)).per_token["clipped"]
    over = ratios(rows, rows.new) > 1.1
    assert clipped[over].all() or name == "minpro"
    assert 0 < clipped.mean() < 1
