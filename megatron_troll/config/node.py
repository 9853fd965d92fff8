"""The building blocks of the configuration tree: ranges, strict nodes, slots for methods."""

import difflib
from collections.abc import Iterable
from datetime import date
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

LARGEST = 2**31 - 1  # of every count; larger ones overflow in what a run hands them to
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
# A hundred days: beyond 290 years, clocks and timeouts overflow.
Seconds = Annotated[float, Field(gt=0, le=8_640_000)]
Threads = Annotated[int, Field(ge=1, le=1024)]
Files = Annotated[tuple[str, ...], Field(min_length=1)]
COLDEST = 1e-3
LONGEST_NAME = 200  # bytes; a file system takes 255, and logs and studies add to it


def _not_too_cold(temperature: float) -> float:
    if 0 < temperature < COLDEST:
        raise ValueError(
            f"got {temperature!r}, expected 0 (greedy) or a number >= {COLDEST}: logits overflow below"
        )
    return temperature


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_not_too_cold)]


def _one_folder(name: str) -> str:
    """The name, if it is one of a folder inside `runs`. Raises ValueError."""
    if name in ("", ".", "..") or "/" in name or not name.isprintable() or name != name.strip():
        raise ValueError(
            f"got {name!r:.100}, expected the name of one folder inside `runs`: "
            "no separators, not '.' or '..'"
        )
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"got {len(name.encode())} bytes, expected at most {LONGEST_NAME}")
    return name


FolderName = Annotated[str, AfterValidator(_one_folder)]


def _a_day(text: str) -> str:
    """The text, if it is a day as YYYY-MM-DD. Raises ValueError."""
    try:
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise ValueError(f"got {text!r:.100}, expected a day such as 2026-11-30")


Day = Annotated[str, AfterValidator(_a_day)]


class Node(BaseModel):
    """Strict and frozen: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Slot(BaseModel):
    """A method by name (or by import path `package.module:Class`) with the fields of its own config."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str = Field(description="a method, or `package.module:Class`")

    @property
    def fields(self) -> dict[str, object]:
        return dict(self.model_extra or {})


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file and line, the key, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the nearest known name, or all known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + (", ".join(names) or "none")
