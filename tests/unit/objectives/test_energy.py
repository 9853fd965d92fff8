"""Energy by token frequency: against the gradient at the logits, and as shares that add up."""

from dataclasses import replace

import pytest
import torch

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives.compose import compose
from megatron_troll.objectives.energy import BUCKETS, Energy
from megatron_troll.objectives.objective import Objective
from megatron_troll.types import ObjectiveInputs
from tests.unit.objectives.rows import Rows, sample

FREQUENCY = [0.3, 0.1, 0.05, 0.01, 0.004, 0.0005, 0.00002]


def objective(region: str, ratio: str = "token") -> Objective:
    config = ObjectiveConfig(trust_region=Slot(name=region), ratio=Slot(name=ratio))
    return replace(compose(config), energy=Energy())


def inputs_of(here: Rows, made: Objective) -> ObjectiveInputs:
    inputs = here.inputs(made)
    n = len(here.target)
    frequency = torch.tensor(FREQUENCY).repeat(n)[:n]
    new = replace(inputs.new, collision=here.new.detach().softmax(1).square().sum(1))
    return replace(inputs, new=new, frequency=frequency)


@pytest.mark.parametrize(("region", "ratio"), [("clip", "token"), ("none", "gspo"), ("cispo", "token")])
def test_it_is_the_size_of_the_gradient_at_the_logits(region: str, ratio: str) -> None:
    here = sample([3, 4, 5, 2])
    made = objective(region, ratio)
    terms = made.loss(inputs_of(here, made))
    (gradient,) = torch.autograd.grad(terms.loss, here.new)
    torch.testing.assert_close(terms.per_token["energy"], gradient.norm(dim=1))
    assert float(terms.per_token["energy"].sum()) > 0


def test_asking_for_it_does_not_change_the_gradient() -> None:
    gradients = []
    for energy in (None, Energy()):
        here = sample([3, 4, 5, 2])
        made = replace(objective("troll"), energy=energy)
        gradients += torch.autograd.grad(made.loss(inputs_of(here, made)).loss, here.new)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_buckets_are_disjoint_and_cover_every_token() -> None:
    here = sample([3, 4, 5, 2])
    made = objective("clip")
    found = made.loss(inputs_of(here, made)).per_token
    tokens = torch.stack([found[f"tokens_bucket_{i}"] for i in range(BUCKETS)])
    energy = torch.stack([found[f"energy_bucket_{i}"] for i in range(BUCKETS)])
    torch.testing.assert_close(energy.sum(0), found["energy"])
    expected = torch.tensor([0, 0, 1, 1, 2, 3, 4]).repeat(len(here.target))[: len(here.target)]
    torch.testing.assert_close(tokens.argmax(0), expected)
    torch.testing.assert_close(tokens.sum(0), torch.ones_like(tokens[0]))


def test_a_batch_without_counts_is_refused() -> None:
    here, made = sample([3, 4, 5, 2]), objective("clip")
    with pytest.raises(ValueError, match="energy reads token frequencies"):
        made.loss(replace(inputs_of(here, made), frequency=None))
