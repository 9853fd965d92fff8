"""The slot table: which methods go together, and the objective that a configuration names (ALGORITHMS 7).

Methods named by import path answer for themselves: no rule of the table is applied to them.
"""

from collections.abc import Iterator
from dataclasses import replace

from megatron_troll.advantages import Advantage
from megatron_troll.config.methods import build_method
from megatron_troll.config.node import ConfigError
from megatron_troll.config.tree import Node, ObjectiveConfig, Slot
from megatron_troll.objectives.entropy import FullEntropy, SparseEntropy
from megatron_troll.objectives.masking import Masking
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.slots import Correction, Kl, Ratio, TrustRegion
from megatron_troll.objectives.trust_region.troll import Budget, Troll

OBJECTIVES = "megatron_troll.objectives"
SLOTS: dict[str, tuple[str, type[Node]]] = {
    "advantage": ("megatron_troll.advantages", Advantage),
    "ratio": (f"{OBJECTIVES}.ratio", Ratio),
    "trust_region": (f"{OBJECTIVES}.trust_region", TrustRegion),
    "kl": (f"{OBJECTIVES}.kl", Kl),
    "correction": (f"{OBJECTIVES}.correction", Correction),
}
MASKS = frozenset({"cppo", "dppo", "trm"})
WEIGHTS = frozenset({"cispo", "minpro"})
# ratio -> the trust regions it is defined with
TRUST_REGIONS = {
    "token": frozenset({"none", "clip", "symclip", "troll"}) | MASKS | WEIGHTS,
    "gspo": frozenset({"none", "clip", "troll"}),
    "dfpo": frozenset({"clip", "troll"}),
}
JACKPOT_WITH = frozenset({"none", "clip", "troll"})


def compose(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration. Raises ConfigError for an unknown method or field, and for a
    combination that has no meaning, with the reason."""
    objective = _with_entropy(Objective(**_methods(config)), config)
    if problems := list(_problems(config, objective)):
        raise ConfigError("\n".join(f"objective: {problem}" for problem in problems))
    return objective


def _with_entropy(objective: Objective, config: ObjectiveConfig) -> Objective:
    coef, region = config.entropy_bonus, objective.trust_region
    if not coef:
        return objective
    if config.entropy_over == "full":
        return replace(objective, entropy=FullEntropy(coef=coef))
    if not isinstance(region, Troll):
        raise ConfigError(
            "objective.entropy_over=sparse is the entropy of the sparse policy that trust_region troll makes "
            f"and trust_region is {config.trust_region.name!r}; use entropy_over=full"
        )
    return replace(objective, entropy=SparseEntropy(coef=coef, region=region))


def resolve(config: ObjectiveConfig) -> ObjectiveConfig:
    """The same configuration with every field of every method written out."""
    slots = {
        slot: Slot(name=getattr(config, slot).name, **method.model_dump(mode="json", by_alias=True))
        for slot, method in _methods(config).items()
    }
    return config.model_copy(update=slots)


def remarks(config: ObjectiveConfig, objective: Objective) -> tuple[str, ...]:
    """What whoever reads the results of a run should know about its combination of methods."""
    found = []
    region = objective.trust_region
    if (config.ratio.name, config.trust_region.name) == ("dfpo", "troll"):
        found.append("experimental: dfpo weights made from the projected policy have no paper behind them")
    if isinstance(region, Troll) and isinstance(region.bound, Budget):
        found.append("the bound is CPPO's budget on KL(new || old); CPPO itself measures KL(mu || new)")
        if region.bound.remark:
            found.append(region.bound.remark)
    return tuple(found)


def head_gradient(objective: Objective) -> str:
    """Which way back the LM head takes (mcore/head.py), and why."""
    if dense := _dense(objective):
        return (
            "LM head: gradient through the full softmax, in chunks of whole rows formed again in backward, "
            f"because of {dense}"
        )
    return "LM head: gradient through the kept columns alone; nothing differentiates the full softmax"


def refuse_dense_head(objective: Objective) -> None:
    """Raises ConfigError where a method needs the gradient of the full softmax, not that of the kept tokens
    alone (ALGORITHMS 1.7)."""
    if dense := _dense(objective):
        raise ConfigError(
            f"objective.head=sparse: the full softmax is differentiated by {dense}; set "
            "objective.head=auto, or trust_region troll, kl none or tike_sparse, entropy_over sparse and "
            "observe.energy=false"
        )


def _dense(objective: Objective) -> str:
    """The configuration's names of what differentiates the full softmax."""
    slots = ("ratio", "trust_region", "kl", "correction")
    named = {slot: getattr(objective, slot) for slot in slots}
    named |= {"entropy_bonus": objective.entropy, "observe.energy": objective.energy}
    return ", ".join(
        name for name, method in named.items() if method is not None and method.reads.full_softmax
    )


def _problems(config: ObjectiveConfig, objective: Objective) -> Iterator[str]:
    ratio, region = config.ratio.name, config.trust_region.name
    if ":" not in ratio + region and region not in TRUST_REGIONS[ratio]:
        yield (
            f"ratio {ratio!r} is not defined with trust_region {region!r}: {_reason(ratio, region)}; "
            f"it goes with {', '.join(sorted(TRUST_REGIONS[ratio]))}"
        )
    if ratio == "dfpo" and config.advantage.name == "gae":
        yield "ratio 'dfpo' weighs whole responses by centred advantages; advantage 'gae' has neither"
    if region == "cispo" and config.aggregation != "token-mean":
        yield f"trust_region 'cispo' is defined with aggregation token-mean, not {config.aggregation}"
    yield from _correction_problems(config, objective.trust_region)


def _reason(ratio: str, region: str) -> str:
    if region in MASKS | WEIGHTS:
        return "it weighs tokens by their own ratios"
    if region == "symclip":
        return "its bound and its cancellation are those of token ratios"
    return "its weights are those that a clip leaves (eq. 47)"


def _correction_problems(config: ObjectiveConfig, region: TrustRegion) -> Iterator[str]:
    ratio, name, correction = config.ratio.name, config.trust_region.name, config.correction.name
    if correction == "jackpot" and ":" not in ratio + name and (ratio != "token" or name not in JACKPOT_WITH):
        yield (
            f"correction 'jackpot' rejects single tokens: it is not defined with ratio {ratio!r} and "
            f"trust_region {name!r}; it goes with ratio token and {', '.join(sorted(JACKPOT_WITH))}"
        )
    if correction not in ("tis", "icepop"):
        return
    if isinstance(region, Masking) and region.against == "rollout":
        yield (
            f"trust_region {name!r} measures the ratio against the rollout policy, which contains the "
            f"correction {correction!r} already; set correction none, or trust_region.against=old"
        )
    if config.old == "engine":
        yield (
            f"correction {correction!r} weighs by old over rollout, which is 1 with objective.old=engine; "
            "set correction none, or objective.old=trainer"
        )


def _methods(config: ObjectiveConfig) -> dict:
    return {
        slot: build_method(getattr(config, slot), folder, kind, f"objective.{slot}")
        for slot, (folder, kind) in SLOTS.items()
    }
