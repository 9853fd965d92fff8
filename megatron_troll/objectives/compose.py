"""The slot table: which methods go together, and the objective that a configuration names (ALGORITHMS 7)."""

from megatron_troll.advantages import Advantage
from megatron_troll.config.errors import ConfigError
from megatron_troll.config.methods import build_method
from megatron_troll.config.tree import Node, ObjectiveConfig, Slot
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.slots import Correction, Kl, Ratio, TrustRegion

OBJECTIVES = "megatron_troll.objectives"
SLOTS: dict[str, tuple[str, type[Node]]] = {
    "advantage": ("megatron_troll.advantages", Advantage),
    "ratio": (f"{OBJECTIVES}.ratio", Ratio),
    "trust_region": (f"{OBJECTIVES}.trust_region", TrustRegion),
    "kl": (f"{OBJECTIVES}.kl", Kl),
    "correction": (f"{OBJECTIVES}.correction", Correction),
}
# ratio -> the trust regions it is defined with
TRUST_REGIONS = {"token": frozenset({"none", "clip", "troll"})}


def compose(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration. Raises ConfigError for an unknown method or field, and for a
    combination that has no meaning, with the reason."""
    objective = Objective(**_methods(config))
    refuse(config)
    return objective


def resolve(config: ObjectiveConfig) -> ObjectiveConfig:
    """The same configuration with every field of every method written out."""
    slots = {
        slot: Slot(name=getattr(config, slot).name, **method.model_dump(mode="json"))
        for slot, method in _methods(config).items()
    }
    return config.model_copy(update=slots)


def refuse(config: ObjectiveConfig) -> None:
    """Raises ConfigError for combinations that are wrong. Methods named by import path answer for
    themselves."""
    ratio, region = config.ratio.name, config.trust_region.name
    if ":" in ratio or ":" in region or region in TRUST_REGIONS[ratio]:
        return
    raise ConfigError(
        f"objective: ratio {ratio!r} is not defined with trust_region {region!r}; "
        f"it goes with {', '.join(sorted(TRUST_REGIONS[ratio]))}"
    )


def _methods(config: ObjectiveConfig) -> dict:
    return {
        slot: build_method(getattr(config, slot), folder, kind, f"objective.{slot}")
        for slot, (folder, kind) in SLOTS.items()
    }
