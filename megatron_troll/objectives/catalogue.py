"""The list of methods that `mtroll methods` prints, generated from the method classes."""

import inspect
import textwrap
from collections.abc import Iterator

from megatron_troll.config import ConfigError, ObjectiveConfig, nearest
from megatron_troll.objectives.compose import CHOICES, SLOTS, Chosen, check_pairing, offered, partners

WIDTH = 110


def listing(slot: str | None = None) -> str:
    """List the methods of every slot (or of one): their use, their partners if they do not go with all, and
    the refused partners with the reason. Raises ConfigError for an unknown slot, and for a file in a slot's
    folder that defines no method of the slot or declares a partner that does not exist."""
    if slot is not None and slot not in SLOTS:
        raise ConfigError(f"mtroll methods: no slot {slot!r}; {nearest(slot, SLOTS)}")
    return "\n".join("\n".join(_of_slot(one)) + "\n" for one in ([slot] if slot else SLOTS))


def _of_slot(slot: str) -> Iterator[str]:
    yield f"objective.{slot}: {ObjectiveConfig.model_fields[slot].description}"
    for one in offered(slot):
        yield from _wrapped(one.name, _use(one), indent=2)
        for pairing in (*one.method.refuses, *one.method.cautions):
            check_pairing(one, pairing, [])
        for key in (*SLOTS, *CHOICES):
            yield from _with(one, key)


def _with(one: Chosen, key: str) -> Iterator[str]:
    """Lines on a method's partners under `key`: refused ones with the reason, and experimental ones."""
    if key == one.slot:
        return
    allowed = partners(one, key)
    known = CHOICES[key] if key in CHOICES else [other.name for other in offered(key)]
    refused: dict[str, list[str]] = {}
    for name in known:
        if name not in allowed:
            refused.setdefault(_reason(one, key, name), []).append(name)
    if refused:
        yield from _wrapped("", f"goes with {key} {', '.join(allowed)}", indent=4)
    for reason, names in refused.items():
        yield from _wrapped("", f"not with {key} {', '.join(names)}: {reason}", indent=4)
    for pairing in one.method.cautions:
        if pairing.key == key:
            text = f"experimental with {key} {', '.join(pairing.names)}: {pairing.reason}"
            yield from _wrapped("", text, indent=4)


def _reason(one: Chosen, key: str, name: str) -> str:
    """The reason why the two do not go together, as given by the method that refuses."""
    if key in CHOICES:
        return next(p.reason for p in one.method.refuses if p.key == key and name in p.names)
    other = next(other for other in offered(key) if other.name == name)
    own = [pairing.reason for pairing in one.method.refuses if other.is_one_of(pairing)]
    return (own + [pairing.reason for pairing in other.method.refuses if one.is_one_of(pairing)])[0]


def _use(one: Chosen) -> str:
    """The first paragraph of the docstring of the method's file."""
    module = inspect.getmodule(type(one.method))
    return " ".join((inspect.getdoc(module) or "").split("\n\n")[0].split())


def _wrapped(head: str, text: str, indent: int) -> list[str]:
    first = f"{'':{indent}}{head:11} "
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * (len(first) + 2))
