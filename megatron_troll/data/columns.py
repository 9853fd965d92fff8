"""Values of a row by the names of its columns; what is said of a column that is not there."""

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from megatron_troll.config import nearest
from megatron_troll.data.rows import Malformed

Record = dict[str, Any]
LEVELS = 3  # of columns inside columns that an error names
ABSENT = object()
SHOWN = 40  # characters of a value in an error


class NoColumn(Malformed):
    """A row has no column `path`; the message names the nearest."""

    def __init__(self, path: str, record: Record) -> None:
        super().__init__(f"no column {path!r}; {nearest(path, _paths(record))}")
        self.path = path


def value_of(record: Record, path: str) -> Any:
    """The value in a column, None included. A name with dots that is no column itself goes into objects by
    key and into lists by number, from the end if that is negative. Raises NoColumn."""
    value = _found(record, path)
    if value is ABSENT:
        raise NoColumn(path, record)
    return value


def has(record: Record, path: str) -> bool:
    """Whether a row has a column, whatever is in it."""
    return _found(record, path) is not ABSENT


def needed(record: Record, path: str) -> Any:
    """The value in a column. Raises Malformed if there is no such column, or nothing is in it."""
    value = value_of(record, path)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise Malformed(f"the column {path!r} is empty")
    return value


def text_of(value: Any, path: str) -> str:
    """A value as text that is not empty: numbers are written out, 142.0 as 142, and a list of one counts as
    what is in it. Raises Malformed."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        raise Malformed(f"the column {path!r} holds {len(value)} values, and one is expected")
    if not isinstance(value, str) or not value:
        raise Malformed(f"the column {path!r} must hold text that is not empty, got {value!r:.80}")
    return value


def shown(record: Record) -> str:
    """A row for an error: its columns and the beginnings of what they hold."""
    parts = (f"{name}={_short(value)}" for name, value in record.items())
    return f"{', '.join(parts):.400}" or "(no columns)"


def without(record: Record, *paths: str | None) -> Record:
    """A row without these columns. One inside another stays."""
    return {name: value for name, value in record.items() if name not in paths}


def _found(record: Record, path: str) -> Any:
    if path in record:
        return record[path]
    value: Any = record
    for step in path.split("."):
        if isinstance(value, dict) and step in value:
            value = value[step]
        elif isinstance(value, list) and _is_place(step, value):
            value = value[int(step)]
        else:
            return ABSENT
    return value


def _is_place(step: str, values: list[Any]) -> bool:
    return step.removeprefix("-").isdecimal() and -len(values) <= int(step) < len(values)


def _paths(value: Any, prefix: str = "", levels: int = LEVELS) -> Iterator[str]:
    if not isinstance(value, dict) or not levels:
        return
    for name, inner in value.items():
        yield f"{prefix}{name}"
        yield from _paths(inner, f"{prefix}{name}.", levels - 1)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
