"""Compose the objective that a configuration names, and check which methods go together (ALGORITHMS 7).

Each method declares the partners it is not defined with (`SlotMethod.refuses`). The only method known by name
here is TROLL, for the entropy of its sparse policy.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple, get_args

from megatron_troll.advantages import Advantage
from megatron_troll.config import (
    ConfigError,
    ObjectiveConfig,
    Pairing,
    Slot,
    SlotMethod,
    build_method,
    find_class,
    known_methods,
    line_of,
    nearest,
)
from megatron_troll.objectives.entropy import FullEntropy, SparseEntropy
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.slots import Correction, Kl, Ratio, TrustRegion
from megatron_troll.objectives.trust_region.troll import Troll

OBJECTIVES = "megatron_troll.objectives"
SLOTS: dict[str, tuple[str, type[SlotMethod]]] = {
    "advantage": ("megatron_troll.advantages", Advantage),
    "ratio": (f"{OBJECTIVES}.ratio", Ratio),
    "trust_region": (f"{OBJECTIVES}.trust_region", TrustRegion),
    "kl": (f"{OBJECTIVES}.kl", Kl),
    "correction": (f"{OBJECTIVES}.correction", Correction),
}
CHOICES: dict[str, tuple[str, ...]] = {
    key: get_args(ObjectiveConfig.model_fields[key].annotation) for key in ("aggregation", "old")
}


class Chosen(NamedTuple):
    """A method, with the slot and the name that chose it."""

    slot: str
    name: str
    method: SlotMethod

    def is_one_of(self, pairing: Pairing) -> bool:
        return self.slot == pairing.key and bool({self.name, self.method.family} & set(pairing.names))


def compose(config: ObjectiveConfig) -> Objective:
    """The objective of a configuration. Raises ConfigError for an unknown method or field, and for a
    combination that is not defined, with the reason."""
    methods = _methods(config)
    objective = _with_entropy(Objective(**methods), config)
    if problems := list(_problems(config, methods)):
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
    """Notes on the combination of methods for the reader of a run's results."""
    chosen = _chosen(config, {slot: getattr(objective, slot) for slot in SLOTS})
    found = [
        f"experimental: {pairing.reason}"
        for one in chosen
        for pairing in one.method.cautions
        if any(other.is_one_of(pairing) for other in chosen)
    ]
    return (*found, *objective.trust_region.remarks(objective.ratio))


def head_remarks(objective: Objective, vocab: int) -> Iterator[str]:
    """Log lines on how a run of `objective` reads `vocab` tokens."""
    yield head_gradient(objective)
    reads = (objective.reads, objective.reads_old, objective.reads_reference)
    kept = max((read.topk.k for read in reads if read.topk is not None), default=0)
    if kept >= vocab:
        yield f"K = {kept} covers the vocabulary of {vocab} tokens: nothing is sparse in this run"


def head_gradient(objective: Objective) -> str:
    """A log line on the columns of the LM head that the gradient passes through (mcore/head.py), and why."""
    if dense := _dense(objective):
        return (
            "LM head: gradient through the full softmax, in chunks of whole rows recomputed in backward, "
            f"because of {dense}"
        )
    return "LM head: gradient through the kept top-K columns only; no method needs the full softmax"


def refuse_dense_head(objective: Objective) -> None:
    """Raises ConfigError if a method needs the gradient of the full softmax, not only that of the kept tokens
    (ALGORITHMS 1.7)."""
    if dense := _dense(objective):
        raise ConfigError(
            f"objective.head=sparse: the full softmax is differentiated by {dense}; set "
            "objective.head=auto, or trust_region troll, kl none or tike_sparse, entropy_over sparse and "
            "observe.energy=false"
        )


def _dense(objective: Objective) -> str:
    """Configuration keys of the methods that differentiate the full softmax, joined by commas; "" if none."""
    slots = ("ratio", "trust_region", "kl", "correction")
    named = {slot: getattr(objective, slot) for slot in slots}
    named |= {"entropy_bonus": objective.entropy, "observe.energy": objective.energy}
    return ", ".join(
        name for name, method in named.items() if method is not None and method.reads.full_softmax
    )


def _problems(config: ObjectiveConfig, methods: Mapping[str, SlotMethod]) -> Iterator[str]:
    chosen = _chosen(config, methods)
    for one in chosen:
        for pairing in (*one.method.refuses, *one.method.cautions):
            check_pairing(one, pairing, chosen)
        for pairing in one.method.refuses:
            if pairing.key in CHOICES and getattr(config, pairing.key) in pairing.names:
                other = getattr(config, pairing.key)
            else:
                other = next((other.name for other in chosen if other.is_one_of(pairing)), "")
            if other:
                yield (
                    f"{one.slot} {one.name!r} is not defined with {pairing.key} {other!r}: {pairing.reason}; "
                    f"it goes with {pairing.key} {', '.join(partners(one, pairing.key))}"
                )


def _chosen(config: ObjectiveConfig, methods: Mapping[str, SlotMethod]) -> list[Chosen]:
    return [Chosen(slot, getattr(config, slot).name, method) for slot, method in methods.items()]


def check_pairing(one: Chosen, pairing: Pairing, others: list[Chosen]) -> None:
    """Raises ConfigError, with file and line, if a method declares a partner that does not exist. `others`:
    chosen methods, which may come from outside the package and have families that no folder lists."""
    known = CHOICES.get(pairing.key, ())
    if pairing.key in SLOTS:
        known = known_methods(SLOTS[pairing.key][0])
        if not set(pairing.names) <= set(known):  # Families need every file imported.
            everyone = (*offered(pairing.key), *others)
            known = (
                *known,
                *(o.method.family for o in everyone if o.slot == pairing.key and o.method.family),
            )
    elif pairing.key not in CHOICES:
        _refuse_partner(one, pairing.key, "key", (*SLOTS, *CHOICES))
    for name in pairing.names:
        if name not in known:
            _refuse_partner(one, name, pairing.key, known)


def _refuse_partner(one: Chosen, name: str, what: str, known: tuple[str, ...]) -> None:
    place = line_of(type(one.method), f'"{name}"')
    raise ConfigError(
        f"{place}: {one.slot} {one.name!r} declares a partner {what} {name!r}, which does not exist; "
        f"{nearest(name, known)}"
    )


def offered(slot: str) -> list[Chosen]:
    """Every method of a slot's folder, with its defaults. Raises ConfigError like `find_class`."""
    return [Chosen(slot, name, _by_default(slot, name)) for name in known_methods(SLOTS[slot][0])]


def _by_default(slot: str, name: str) -> SlotMethod:
    kind = find_class(name, *SLOTS[slot], f"objective.{slot}.name")
    required = any(field.is_required() for field in kind.model_fields.values())
    return kind.model_construct() if required else kind()


def partners(one: Chosen, key: str) -> list[str]:
    """The methods of another slot (with their defaults), or the values of a key, that `one` goes with."""
    if key in CHOICES:
        refused = {name for pairing in one.method.refuses if pairing.key == key for name in pairing.names}
        return [name for name in CHOICES[key] if name not in refused]
    return [
        other.name
        for other in offered(key)
        if not any(other.is_one_of(pairing) for pairing in one.method.refuses)
        and not any(one.is_one_of(pairing) for pairing in other.method.refuses)
    ]


def _methods(config: ObjectiveConfig) -> dict:
    """The method of each slot. Defaults of a trust region that depend on the ratio count as if they were
    set."""
    ratio = build_method(config.ratio, *SLOTS["ratio"], "objective.ratio")
    assert isinstance(ratio, Ratio)
    folder, kind = SLOTS["trust_region"]
    region = find_class(config.trust_region.name, folder, kind, "objective.trust_region.name")
    assert issubclass(region, TrustRegion)
    fields = region.defaults(ratio) | config.trust_region.model_dump()
    chosen = config.model_copy(update={"trust_region": Slot.model_validate(fields)})
    return {
        slot: build_method(getattr(chosen, slot), *place, f"objective.{slot}")
        for slot, place in SLOTS.items()
    }
