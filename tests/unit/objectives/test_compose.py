import pytest
import torch
from torch import Tensor

from megatron_troll.config.errors import ConfigError
from megatron_troll.config.tree import ObjectiveConfig, Slot
from megatron_troll.objectives import compose, resolve
from megatron_troll.objectives.compose import refuse
from megatron_troll.objectives.objective import merge_reads
from megatron_troll.objectives.slots import Correction, Policy, Statistics, Term
from megatron_troll.types import ObjectiveInputs, Readings, Reads, Support
from tests.unit.golden.records import inputs_of


class HalfOfTheStep(Correction):
    """A method from outside the package: weighs by a number over the whole step."""

    share: float = 0.5

    @property
    def needs_statistics(self) -> bool:
        return True

    def statistics(self, inputs: ObjectiveInputs) -> Statistics:
        return {"tokens": torch.tensor(float(len(inputs.weight)))}

    def weight(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        assert statistics is not None
        return Term(self.share / statistics["tokens"] * torch.ones_like(inputs.advantage))


def slot(name: str, **fields: object) -> Slot:
    return Slot.model_validate({"name": name} | fields)


def test_the_default_is_grpo_with_troll():
    objective = compose(ObjectiveConfig())
    assert objective.reads == Reads(topk=Support("old", 64, 1e-5))
    assert objective.reads_old == Reads(topk=Support("own", 64, 1e-5))
    assert not objective.needs_statistics


def test_resolving_writes_out_every_field():
    resolved = resolve(ObjectiveConfig(trust_region=slot("troll", bound=0.1)))
    assert resolved.trust_region.fields == {
        "bound": 0.1, "alpha": 1.0, "k": 64, "delta": 1e-5, "p_d": 1e-12, "support": "old",
    }  # fmt: skip
    assert resolve(resolved) == resolved
    assert compose(resolved) == compose(ObjectiveConfig(trust_region=slot("troll", bound=0.1)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            ObjectiveConfig(trust_region=slot("trol")),
            r"trust_region.name: unknown method 'trol'; did you mean 'troll'\? Known here: clip, none",
        ),
        (ObjectiveConfig(advantage=slot("grop")), "objective.advantage.name.*did you mean 'grpo'"),
        (ObjectiveConfig(trust_region=slot("troll", bund=1)), r"trust_region.bund: .*did you mean 'bound'\?"),
        (ObjectiveConfig(trust_region=slot("troll", bound=-0.1)), "trust_region.bound: got -0.1, .* >= 0"),
        (ObjectiveConfig(trust_region=slot("troll", delta=1.0)), "trust_region.delta: got 1.0"),
        (ObjectiveConfig(trust_region=slot("clip", eps_low=1.5)), "trust_region.eps_low: got 1.5"),
        (ObjectiveConfig(ratio=slot("no.such.module:Class")), "objective.ratio.name: cannot import"),
        (
            ObjectiveConfig(ratio=slot("megatron_troll.objectives.kl.none:NoKl")),
            "does not lead to a subclass of Ratio",
        ),
    ],
)
def test_bad_slots_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        compose(config)


def test_pairs_outside_the_table_are_refused_with_what_is_allowed():
    with pytest.raises(ConfigError, match=r"ratio 'token' is not defined with .* goes with clip, none"):
        refuse(ObjectiveConfig(trust_region=slot("later")))


def test_a_method_by_import_path_and_statistics_of_the_step():
    path = f"{__name__}:HalfOfTheStep"
    objective = compose(ObjectiveConfig(trust_region=slot("none"), correction=slot(path, share=0.25)))
    assert resolve(ObjectiveConfig(correction=slot(path))).correction.fields == {"share": 0.5}
    logp = torch.zeros(4)
    readings = Readings(logp, None, None)
    inputs = inputs_of(readings, readings, torch.ones(4), torch.ones(4))
    statistics = objective.statistics(inputs)
    assert statistics is not None
    over_two_ranks = {name: 2 * value for name, value in statistics.items()}
    assert objective.loss(inputs, over_two_ranks).loss.item() == pytest.approx(-4 * 0.25 / 8)
    assert compose(ObjectiveConfig(trust_region=slot("none"))).statistics(inputs) is None


def test_reads_of_the_slots_are_joined():
    first, second = Reads(topk=Support("old", 8, 0.0)), Reads(logp=True)
    assert merge_reads((first, second)) == Reads(True, Support("old", 8, 0.0))
    with pytest.raises(ValueError, match="one top-K record, not 2"):
        merge_reads((first, Reads(topk=Support("own", 8, 0.0))))


def test_advantage_belongs_to_the_objective():
    advantage: Tensor = compose(ObjectiveConfig()).advantage(torch.tensor([1.0, 0.0]), torch.tensor([0, 0]))
    assert advantage.tolist() == pytest.approx([0.70710, -0.70710], abs=1e-4)
