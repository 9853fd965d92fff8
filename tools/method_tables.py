"""Print the tables of docs/methods.md, made by composing objectives and querying their methods:

python tools/method_tables.py
"""

import sys
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from megatron_troll.advantages import Advantage
from megatron_troll.config import ConfigError, ObjectiveConfig, find_class, known_methods
from megatron_troll.objectives.compose import SLOTS, compose
from megatron_troll.objectives.entropy import FullEntropy, SparseEntropy
from megatron_troll.objectives.slots import Method
from megatron_troll.objectives.trust_region.troll import Troll
from megatron_troll.types import HeadRequest

Triple = tuple[str, str, str]
AXES = ("ratio", "trust_region", "correction")
FROM_OLD = {"against": "old"}
# Options that can be combined with the three slots of the first table.
BESIDE: dict[str, tuple[dict[str, Any], ...]] = {
    "advantage": tuple({"advantage": {"name": name}} for name in known_methods(SLOTS["advantage"][0])),
    "kl": tuple({"kl": {"name": name}} for name in known_methods(SLOTS["kl"][0])),
    "aggregation": tuple(
        {"aggregation": name} for name in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm")
    ),
    "entropy_over": tuple({"entropy_over": name, "entropy_bonus": 0.01} for name in ("full", "sparse")),
    "old": ({"old": "trainer"}, {"old": "engine"}),
}


def combinations() -> str:
    """Table of ratio x trust_region: the corrections that each pair allows."""
    ratios = ("token", "gspo", "dfpo")
    lines = [f"| `trust_region` | {' | '.join(f'`ratio: {r}`' for r in ratios)} |", "|---" * 4 + "|"]
    for region in known_methods(SLOTS["trust_region"][0]):
        cells = " | ".join(_cell(ratio, region) for ratio in ratios)
        lines.append(f"| `{region}` | {cells} |")
    return "\n".join(lines)


def exceptions() -> str:
    """Table of the options in BESIDE that are refused with some combinations that the first table allows."""
    triples = [(*pair, correction) for pair in _pairs() for correction in _corrections(*pair, {})]
    lines = ["| choice | not with |", "|---|---|"]
    for key, choices in BESIDE.items():
        for choice in choices:
            refused = {triple for triple in triples if not _allowed(*triple, choice)}
            if refused:
                named = choice[key]["name"] if isinstance(choice[key], dict) else choice[key]
                lines.append(f"| `{key}: {named}` | {_common(refused, triples)} |")
    return "\n".join(lines)


def needs() -> str:
    """Table of what each method reads and needs, by default."""
    lines = [
        "| method | gradient through | reads of the current policy | reads of the old policy | needs |",
        "|---" * 5 + "|",
    ]
    for name, method in methods():
        if isinstance(method, Advantage):
            lines.append(f"| {name} | - | - | - | {_needs_of_advantage(method)} |")
            continue
        reads = (_read(method.reads), _read(method.reads_old))
        cells = " | ".join(text or "-" for text in (gradient_through(method.reads), *reads, _needs(method)))
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def methods() -> Iterator[tuple[str, Advantage | Method]]:
    """Yield the name of the row and the method with its defaults, for every method."""
    for slot, (folder, kind) in SLOTS.items():
        for name in known_methods(folder):
            yield f"`{slot}: {name}`", find_class(name, folder, kind, slot)()  # pyright: ignore[reportReturnType]
    yield "`entropy_over: full`", FullEntropy(coef=0.01)
    yield "`entropy_over: sparse`", SparseEntropy(coef=0.01, region=Troll())


def gradient_through(reads: HeadRequest) -> str:
    """The part of the head that has a gradient: the full softmax, or only the logits of kept tokens."""
    if reads.logp or reads.full or reads.entropy or reads.reference_kl:
        return "full softmax"
    return "kept logits" if reads.topk else ""


def _read(reads: HeadRequest) -> str:
    found = []
    if reads.logp:
        found.append("log-prob (N x V)")
    if kept := reads.topk:
        whole = "N x V" if reads.full else "N x V to choose" if kept.kind == "own" else "N x K"
        whose = "own" if kept.kind == "own" else "old policy's"
        found.append(f"{whose} top {kept.k} ({whole})")
    if reads.at_rollout:
        found.append("engine's top K, no gradient (N x V)")
    if reads.entropy:
        found.append("entropy (N x V)")
    if reads.reference_kl:
        found.append("KL to the reference (2 N x V)")
    return ", ".join(found)


def _needs(method: Method) -> str:
    found = {
        "reference": method.reads_reference != HeadRequest(),
        f"engine's top {method.rollout_k}": method.rollout_k > 0,
        "statistics pass": method.needs_statistics,
    }
    return ", ".join(name for name, needed in found.items() if needed)


def _needs_of_advantage(method: Advantage) -> str:
    found = {"critic": method.needs_values, "2 answers to a prompt": method.needs_groups}
    return ", ".join(name for name, needed in found.items() if needed)


def _cell(ratio: str, region: str) -> str:
    plain = _corrections(ratio, region, {})
    text = ", ".join(plain) or "-"
    if plain and region in _masks():
        more = [name for name in _corrections(ratio, region, FROM_OLD) if name not in plain]
        text += f"; with `against: old` also {', '.join(more)}"
    return text


def _masks() -> set[str]:
    folder, kind = SLOTS["trust_region"]
    return {n for n in known_methods(folder) if "against" in find_class(n, folder, kind, n).model_fields}


def _pairs() -> Iterator[tuple[str, str]]:
    return product(*(known_methods(SLOTS[axis][0]) for axis in AXES[:2]))  # pyright: ignore[reportReturnType]


def _corrections(ratio: str, region: str, fields: Mapping[str, Any]) -> list[str]:
    names = ("none", "tis", "icepop", "jackpot")
    return [name for name in names if _allowed(ratio, region, name, {}, fields)]


def _allowed(
    ratio: str, region: str, correction: str, beside: Mapping[str, Any], fields: Mapping[str, Any] = {}
) -> bool:
    slots = {"ratio": {"name": ratio}, "trust_region": {"name": region, **fields}}
    try:
        compose(ObjectiveConfig.model_validate(slots | {"correction": {"name": correction}} | dict(beside)))
    except ConfigError:
        return False
    return True


def _common(refused: set[Triple], triples: list[Triple]) -> str:
    """Describe the refused triples by the values of one slot. Raises ValueError if no single slot can."""
    for place, axis in enumerate(AXES):
        values = {triple[place] for triple in refused}
        if refused == {triple for triple in triples if triple[place] in values}:
            kept = {triple[place] for triple in triples} - values
            few, all_but = (
                f"`{axis}: {', '.join(sorted(values))}`",
                f"any `{axis}` but `{', '.join(sorted(kept))}`",
            )
            return few if len(values) <= len(kept) else all_but
    raise ValueError(f"no single slot explains {sorted(refused)}")


if __name__ == "__main__":
    sys.stdout.write("\n\n".join((combinations(), exceptions(), needs())) + "\n")
