import pytest
import torch
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.types import HeadOutputs, LossTerms
from tests.unit.golden.records import inputs_of


def objective(**slot: object) -> Objective:
    return compose(ObjectiveConfig(trust_region=Slot.model_validate(slot)))


def run(method: Objective, ratio: list[float], advantage: list[float]) -> tuple[LossTerms, Tensor]:
    """Loss of tokens with these ratios, weight 1 each, and its gradient with respect to log pi."""
    logp = torch.tensor(ratio, dtype=torch.float64).log().requires_grad_()
    old = torch.zeros_like(logp).detach()
    a = torch.tensor(advantage, dtype=torch.float64)
    terms = method.loss(
        inputs_of(HeadOutputs(logp, None, None), HeadOutputs(old, None, None), a, torch.ones_like(a))
    )
    (gradient,) = torch.autograd.grad(terms.loss, logp)
    return terms, gradient


def test_clip_by_hand():
    """A > 0 is bounded above at 1.28, A < 0 below at 0.8; a clipped token has no gradient."""
    ratio, advantage = [1.5, 1.2, 0.5, 1.5, 0.5, 0.9], [2.0, 2.0, 2.0, -1.0, -1.0, -1.0]
    terms, gradient = run(objective(name="clip", eps_low=0.2, eps_high=0.28), ratio, advantage)
    value = [2.56, 2.4, 1.0, -1.5, -0.8, -0.9]
    assert terms.per_token["objective"].tolist() == pytest.approx(value)
    assert terms.loss.item() == pytest.approx(-sum(value))
    assert (-gradient).tolist() == pytest.approx([0.0, 2.4, 1.0, -1.5, 0.0, -0.9])
    assert terms.per_token["clipped"].tolist() == [1, 0, 0, 0, 1, 0]
    assert terms.per_token["ratio"].tolist() == pytest.approx(ratio)


def test_none_is_the_plain_ratio():
    terms, gradient = run(objective(name="none"), [3.0, 0.1], [1.0, -2.0])
    assert terms.per_token["objective"].tolist() == pytest.approx([3.0, -0.2])
    assert (-gradient).tolist() == pytest.approx([3.0, -0.2])


def test_approximate_kl_is_k3():
    terms, _ = run(objective(name="none"), [2.0], [1.0])
    assert terms.per_token["approx_kl"].item() == pytest.approx(1 - torch.tensor(2.0).log().item())


def test_full_softmax_log_probs_are_read_on_both_sides():
    method = objective(name="clip")
    assert method.reads.logp
    assert method.reads_old.logp
    assert method.reads.topk is None


def test_masked_batch_is_zero_on_the_graph():
    method = objective(name="clip")
    logp = torch.zeros(2, requires_grad=True)
    readings = HeadOutputs(logp, None, None)
    loss = method.loss(
        inputs_of(readings, HeadOutputs(logp.detach(), None, None), torch.ones(2), torch.zeros(2))
    )
    loss.loss.backward()
    assert loss.loss.item() == 0
    assert logp.grad is not None


def test_old_log_probs_must_be_finite():
    old = torch.tensor([-1.0, float("-inf"), float("nan")])
    with pytest.raises(ValueError, match=r"not finite at 2 of 3 positions, the first: \[1, 2\]"):
        objective(name="clip").prepare_old(HeadOutputs(old, None, None))
