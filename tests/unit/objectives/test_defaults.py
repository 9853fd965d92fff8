"""Defaults that depend on other choices: bounds by ratio and by divergence."""

import pytest

from megatron_troll.config import ConfigError, ObjectiveConfig, Slot
from megatron_troll.objectives.compose import compose, remarks, resolve


def slot(name: str, **fields: object) -> Slot:
    return Slot.model_validate({"name": name} | fields)


def config(ratio: str, region: Slot) -> ObjectiveConfig:
    return ObjectiveConfig(ratio=Slot(name=ratio), trust_region=region)


@pytest.mark.parametrize(
    ("region", "constants"),
    [
        (slot("cppo"), {"delta": 0.15, "delta_b": 0.02}),
        (slot("cppo", divergence="topk_kl"), {"delta": 0.1, "delta_b": 0.002}),
        (slot("dppo"), {"delta": 0.15}),
        (slot("dppo", divergence="topk_kl"), {"delta": 0.05}),
        (slot("trm"), {"delta": 0.1}),
        (slot("trm", over="avg"), {"delta": 0.002}),
        (slot("troll", bound={"from": "cppo"}),
         {"bound": {"from": "cppo", "delta": 0.1, "delta_b": 0.002, "w_min": 0.8, "t_ref": None,
                    "accumulate": "projected"}}),
    ],
)  # fmt: skip
def test_constants_follow_the_divergence_and_survive_resolving(region, constants):
    resolved = resolve(ObjectiveConfig(trust_region=region))
    fields = resolved.trust_region.fields
    assert {name: fields[name] for name in constants} == constants
    assert resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("ratio", "own", "bounds"),
    [
        ("token", {}, (0.2, 0.2)),
        ("gspo", {}, (3e-4, 4e-4)),
        ("dfpo", {}, (3e-4, 4e-4)),
        ("gspo", {"eps_high": 0.28}, (3e-4, 0.28)),
        ("dfpo", {"eps_low": 0.2, "eps_high": 0.2}, (0.2, 0.2)),
    ],
)
def test_the_clip_of_a_ratio_is_on_its_scale(ratio: str, own: dict, bounds: tuple[float, float]):
    """Where no preset is extended; and a bound that is on another scale is remarked on."""
    chosen = config(ratio, slot("clip", **own))
    objective, resolved = compose(chosen), resolve(chosen)
    fields = resolved.trust_region.fields
    assert (fields["eps_low"], fields["eps_high"]) == bounds
    assert compose(resolved) == objective
    assert bool(remarks(chosen, objective)) == bool(own)
    if own:
        assert "whose defaults are 0.0003, 0.0004" in remarks(chosen, objective)[0]


def test_a_clip_of_sequence_ratios_is_too_tight_for_tokens():
    tight = config("token", slot("clip", eps_low=3e-4, eps_high=4e-4))
    assert "whose defaults are 0.2, 0.2" in remarks(tight, compose(tight))[0]


@pytest.mark.parametrize("kind", ["topk_tv", "binary_tv"])
def test_trm_has_no_threshold_on_a_tv(kind: str):
    with pytest.raises(ConfigError, match=f"{kind} needs a delta"):
        compose(config("token", slot("trm", divergence=kind)))
    set_ = compose(config("token", slot("trm", divergence=kind, delta=0.2)))
    assert set_.trust_region.delta == 0.2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("delta", "delta_b"), [(0.15, 0.02), (0.2, 0.015)])
def test_constants_of_another_divergence_are_remarked_upon(delta: float, delta_b: float):
    bound = {"from": "cppo", "delta": delta, "delta_b": delta_b}
    of_tv = config("token", slot("troll", bound=bound))
    assert "constants for TV" in remarks(of_tv, compose(of_tv))[-1]
