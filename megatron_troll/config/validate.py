"""Validation of a tree of plain values, with errors that name the key and the allowed values."""

import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_troll.config.node import LARGEST, ConfigError, nearest
from megatron_troll.config.shape import Shape
from megatron_troll.config.tree import Slot

Path = tuple[str | int, ...]
MOST = 1_000  # problems that are looked at: each unknown key is compared with the known ones
SHOWN = 20  # wrong keys that one message names
# Types of the errors that our own validators raise; their messages need no rewording.
OWN_MESSAGES = ("value_error", "assertion_error")
# Pydantic's error for a default that it cannot compute, because the field it depends on is wrong.
FOLLOWS = "default_factory_not_called"


def validate[Model: BaseModel](
    kind: type[Model], tree: Any, prefix: str, place: Callable[[Path], str]
) -> Model:
    """Return `tree` as a `kind`. Raises ConfigError with one line per wrong key: `prefix` and the key, the
    problem, and the place in the file that `place` returns for the key's path."""
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        lines = []
        problems = _problems(error, tree, Shape.of(kind))
        for path, problem in islice(problems.items(), SHOWN):
            where = place(path)
            lines.append(f"{_dotted(prefix, path):.200}: {problem}" + (f" ({where})" if where else ""))
        if len(problems) > SHOWN:
            lines.append(f"and {len(problems) - SHOWN:,} keys more")
        raise ConfigError("\n".join(lines)) from error


def read_fields[Model: BaseModel](slot: Slot, kind: type[Model], key: str) -> Model:
    """Read a slot's fields as the method's own config. `key` is the slot's place in the tree ("reward").
    Raises ConfigError for an unknown key (naming the nearest) or a wrong value."""
    return validate(kind, slot.fields, key, lambda path: "")


def _problems(error: ValidationError, tree: Any, shape: Shape) -> dict[Path, str]:
    """Return one problem per key. Each alternative of a union reports its own: an error of our own validators
    is preferred, and a key is left out if a key inside it has a problem."""
    problems: dict[Path, str] = {}
    for item in error.errors(include_url=False)[:MOST]:
        if item["type"] == FOLLOWS:
            continue
        loc = item["loc"]
        missing = item["type"] == "missing"
        path = _existing(tree, loc[:-1]) + loc[-1:] if missing else _existing(tree, loc)
        if path not in problems or item["type"] in OWN_MESSAGES:
            problems[path] = _words(item, path, shape)
    return {path: words for path, words in problems.items() if not _has_inner(path, problems)}


def _has_inner(path: Path, problems: Iterable[Path]) -> bool:
    return any(len(other) > len(path) and other[: len(path)] == path for other in problems)


def _words(item: Any, path: Path, shape: Shape) -> str:
    here = shape.walk(path)
    if item["type"] == "missing":
        return f"missing; expected {here.describe()}" if here else "missing"
    if item["type"] == "extra_forbidden":
        parent = shape.walk(path[:-1])
        return f"unknown key; {nearest(str(path[-1]), parent.keys if parent else [])}"
    if here is None or item["type"] in OWN_MESSAGES:
        return item["msg"].removeprefix("Value error, ")
    limit = item.get("ctx", {}).get("le")
    more = f" and <= {limit}" if limit == LARGEST else ""
    return f"got {item['input']!r:.100}, expected {here.describe()}{more}"


def _existing(tree: Any, loc: Path) -> Path:
    """The keys of a pydantic location that exist in `tree` (the others name alternatives of a union)."""
    path: list[str | int] = []
    for key in loc:
        if (isinstance(tree, dict) and key in tree) or (isinstance(tree, list) and isinstance(key, int)):
            path.append(key)
            tree = tree[key]  # pyright: ignore[reportArgumentType, reportCallIssue]
    return tuple(path)


def _dotted(prefix: str, path: Path) -> str:
    return ".".join(filter(None, (prefix, *map(str, path)))) or "the configuration"
