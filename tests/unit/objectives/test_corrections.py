"""TIS and IcePop: weights of trainer-old over rollout, on the score alone."""

from dataclasses import replace

import pytest
import torch
from torch.autograd import grad

from megatron_troll.config import ConfigError, ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.objectives.mismatch import effective_sample_size
from megatron_troll.types import HeadOutputs, ObjectiveInputs
from tests.unit.golden.records import inputs_of
from tests.unit.objectives.rows import sample


def objective(name: str, trust_region: str = "none", **fields: object) -> Objective:
    slot = Slot.model_validate({"name": name} | fields)
    return compose(ObjectiveConfig(trust_region=Slot(name=trust_region), correction=slot))


def tokens(old_over_rollout: list[float]) -> ObjectiveInputs:
    """Tokens with pi = old and advantage 1."""
    old = torch.tensor(old_over_rollout, dtype=torch.float64).log() - 3.0
    one = torch.ones_like(old)
    readings = HeadOutputs(old.clone().requires_grad_(), None, None)
    inputs = inputs_of(readings, HeadOutputs(old, None, None), one, one)
    return replace(inputs, rollout_logp=torch.full_like(old, -3.0))


@pytest.mark.parametrize(
    ("name", "fields", "weight", "reported"),
    [
        ("tis", {}, [0.1, 1.0, 2.0, 2.0], {"tis_truncated": [0, 0, 0, 1]}),
        ("tis", {"cap": 1.5}, [0.1, 1.0, 1.5, 1.5], {"tis_truncated": [0, 0, 1, 1]}),
        ("icepop", {}, [0.0, 1.0, 2.0, 0.0], {"icepop_left_out": [1, 0, 0, 1]}),
        ("icepop", {"alpha": 0.0, "beta": 9.0}, [0.1, 1.0, 2.0, 8.0], {"icepop_left_out": [0, 0, 0, 0]}),
    ],
)
def test_weights_by_hand(name, fields, weight, reported):
    """pi = old, so that the score is 1 and its gradient, too."""
    method, inputs = objective(name, **fields), tokens([0.1, 1.0, 2.0, 8.0])
    terms = method.loss(inputs)
    assert terms.per_token["objective"].tolist() == pytest.approx(weight)
    assert inputs.new.logp is not None
    (gradient,) = grad(-terms.loss, inputs.new.logp)
    assert gradient.tolist() == pytest.approx(weight)
    assert {name: terms.per_token[name].tolist() for name in reported} == reported
    assert terms.per_token.keys() <= method.diagnostics.keys()


def test_equal_policies_need_no_correction():
    inputs = tokens([1.0, 1.0])
    plain = objective("none").loss(inputs).loss
    assert all(torch.equal(objective(name).loss(inputs).loss, plain) for name in ("tis", "icepop"))


def test_bounds_of_icepop_pass():
    inputs = tokens([0.5, 5.0])
    loose = replace(
        inputs, rollout_logp=torch.zeros(2), old=HeadOutputs(torch.tensor([0.5, 4.0]).log(), None, None)
    )
    assert objective("icepop", beta=4.0).loss(loose).per_token["correction_weight"].tolist() == [0.5, 4.0]


@pytest.mark.parametrize("name", ["tis", "icepop"])
def test_the_regression_of_troll_is_not_weighed(name):
    """Without an advantage the objective is the regression alone, and no correction changes it."""
    rows = sample([4, 3], change=2.0)
    rows = replace(rows, advantage=torch.zeros(2, dtype=torch.float64))
    corrected, plain = objective(name, "troll"), objective("none", "troll")
    first, second = (method.loss(rows.inputs(method)) for method in (corrected, plain))
    assert first.loss.item() > 1e-3
    assert torch.equal(first.loss, second.loss)
    assert (first.per_token["correction_weight"] - 1).abs().max() > 0.05


def test_the_denominator_keeps_tokens_that_are_left_out():
    inputs = replace(tokens([9.0, 1.0]), weight=torch.full((2,), 0.5))
    assert objective("icepop").loss(inputs).loss.item() == pytest.approx(-0.5)


def test_effective_sample_size():
    """3 of 4 tokens weigh alike, the fourth nothing: 3 / 4."""
    weight = torch.tensor([2.0, 2.0, 0.0, 2.0])
    means = {
        "correction_weight": float(weight.mean()),
        "correction_weight_squared": float(weight.square().mean()),
    }
    assert effective_sample_size(means) == {"effective_sample_size": pytest.approx(0.75)}
    assert effective_sample_size(dict.fromkeys(means, 0.0)) == {"effective_sample_size": 0.0}
    assert effective_sample_size({"loss": 1.0}) == {}


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("tis", {"cap": 0.0}, "objective.correction.cap: got 0.0, expected a number > 0"),
        ("icepop", {"alpha": -1.0}, "objective.correction.alpha: got -1.0, expected a number >= 0"),
        ("icepop", {"alpha": 3.0, "beta": 2.0}, "alpha=3 must not exceed beta=2"),
    ],
)
def test_bad_fields_are_refused(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        objective(name, **fields)
