"""reasoning-gym itself: data sets opened by name, and their scorers. Only the process that makes tasks and
reward workers import the library; it takes seconds."""

import ast
import dataclasses
import importlib
import io
import json
import random
import re
import warnings
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cache
from numbers import Real
from types import ModuleType
from typing import Any, Protocol, get_args, get_origin, get_type_hints

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_troll.config import nearest
from megatron_troll.config.data import LEVELS
from megatron_troll.data.gym.refused import REFUSED

Entry = dict[str, Any]
# Ranges of random seeds, so far apart that no item of one is an item of another. An item is made from the
# first seed of its range plus its index, below 2^32, which numpy's old generator needs.
BLOCK, HELD_OUT = 2**18, 2**31
OURS = ("seed", "size")
# Keys of a source that stand beside the options of its set.
BESIDE = {*OURS, "curriculum"}
STRICT = ConfigDict(strict=True)
# Modules whose scorers evaluate the answer as Python where it is not the expected text.
EVALUATE = (
    "algorithmic.binary_matrix",
    "algorithmic.number_sorting",
    "algorithmic.spiral_matrix",
    "algorithmic.string_insertion",
    "games.n_queens",
)
# Scorers that hand the answer to SymPy's parser, which is Python's. An answer that holds more than a formula
# (a call of integrate, or of __import__) is wrong without a look.
ARITHMETIC = re.compile(r"(?:[\d+\-() ]|(?<!\*)\*(?!\*)|(?<!/)/(?!/))*")
FORMULA = re.compile(r"(?:[0-9a-zA-Z+\-*/^() ]|\.(?=\d))*")
FUNCTIONS = {
    *("sin", "cos", "tan", "sec", "csc", "cot", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
    *("exp", "log", "ln", "sqrt", "pi", "Abs"),
}
PARSED = {
    "countdown": ARITHMETIC,
    "intermediate_integration": FORMULA,
    "polynomial_multiplication": FORMULA,
    "simple_integration": FORMULA,
}


class Library(Protocol):
    """A data set of the library."""

    def __getitem__(self, index: int) -> Entry: ...
    def score_answer(self, answer: str | None, entry: Entry) -> float: ...


class GymError(ValueError):
    """A data set cannot be made. option: the key that is at fault, "" if it is not one alone."""

    def __init__(self, what: str, option: str = "") -> None:
        super().__init__(what)
        self.option = option


def first_seed(seed: int, level: int, held_out: bool) -> int:
    """The seed of the first item of a range of BLOCK items. No two ranges meet."""
    return (seed * LEVELS + level) * BLOCK + (HELD_OUT if held_out else 0)


def open_set(
    name: str, options: Mapping[str, Any], first: int = 0, size: int = 1, level: int | None = None
) -> Library:
    """A data set of `size` items with its own options, as a configuration has them, and those of a level of
    its curriculum. Raises GymError for a name or an option that the library does not know or refuses, for a
    set that we refuse, and for an option that the level fixes."""
    kind, config = _known(name)
    values = _read(name, config, options)
    seed_all(first)
    try:
        given = {**values, "seed": first, "size": size}
        made = config(**given) if level is None else _at(name, level, given)
        if hasattr(made, "validate"):
            made.validate()
        return kind(made)
    except (AssertionError, ValueError, TypeError, LookupError, ArithmeticError) as error:
        if isinstance(error, GymError):
            raise
        at = "" if level is None else f" at level {level}"
        raise GymError(f"{name}{at}: {error or type(error).__name__}") from error


def highest_level(name: str) -> int:
    """The highest level of a data set's curriculum. Raises GymError if it has none."""
    return max(len(attribute.levels) for attribute in _curriculum(name).attributes.values()) - 1


def _at(name: str, level: int, given: Mapping[str, Any]) -> Any:
    """The config of a data set at a level, with what is given beside it."""
    curriculum = _curriculum(name)
    names = ("field_name", "lower_field_name", "upper_field_name")
    attributes = curriculum.attributes.values()
    own = {getattr(attribute, key) for attribute in attributes for key in names if hasattr(attribute, key)}
    for key in sorted(own & given.keys()):
        raise GymError("is set by the curriculum: leave it out, or the curriculum", key)
    curriculum.set_global_level(level)
    return curriculum.generate_configuration(given)


def _curriculum(name: str) -> Any:
    _known(name)
    factory = _factory()
    if not factory.has_curriculum(name):
        raise GymError(f"{name} has no levels", "curriculum")
    return factory.create_curriculum(name)


def _known(name: str) -> tuple[Any, Any]:
    """The class of a data set that can be used, and that of its config."""
    factory = _factory()
    if name not in factory.DATASETS:
        raise GymError(
            f"reasoning-gym has no data set {name!r:.80}; {nearest(name, factory.DATASETS)}", "name"
        )
    if name in REFUSED:
        raise GymError(f"{name} is refused: {REFUSED[name]}", "name")
    return factory.DATASETS[name]


@cache
def _factory() -> ModuleType:
    """The library's register of data sets, after its scorers have been made to read answers as literals."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the syntax of a package that it imports
        factory = importlib.import_module("reasoning_gym.factory")
        for module in EVALUATE:
            vars(importlib.import_module(f"reasoning_gym.{module}"))["eval"] = ast.literal_eval
    return factory


def item(opened: Library, index: int, first: int) -> Entry:
    """One item. What the library draws from the generators of the whole process is fixed by its seed too."""
    seed_all(first + index)
    return opened[index]


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)


def judged(opened: Library, name: str, answer: str, entry: Entry) -> float:
    """The score of an answer, in [0, 1]. Raises whatever the scorer raises, and ValueError for what is no
    score. `entry` may be changed."""
    if not harmless(name, answer):
        return 0.0
    with redirect_stdout(io.StringIO()):
        score = opened.score_answer(answer, entry)
    if not isinstance(score, Real) or not -1e-6 <= float(score) <= 1 + 1e-6:
        raise ValueError(f"the scorer of {name} gave {score!r:.60}, expected a number from 0 to 1")
    return min(1.0, max(0.0, float(score)))


def harmless(name: str, answer: str) -> bool:
    """Whether the scorer of a data set may see an answer: it does not run it as a program."""
    if name not in PARSED:
        return True
    words = re.findall(r"[a-zA-Z]{2,}", answer)
    return PARSED[name].fullmatch(answer) is not None and FUNCTIONS.issuperset(words)


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """The check of an option's type. The library writes tuple[str] for tuples of any length."""
    if get_origin(kind) is tuple and len(get_args(kind)) == 1:
        kind = tuple[*get_args(kind), ...]
    return TypeAdapter(kind, config=None if dataclasses.is_dataclass(kind) else STRICT)


def _read(name: str, config: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as the data set's config has them: a list that it wants as a tuple becomes one."""
    kinds = get_type_hints(config)
    known = {field.name for field in dataclasses.fields(config)} - set(OURS)
    values = {}
    for key, value in options.items():
        if key not in known:
            raise GymError(f"{name} has no option {key!r:.80}; {nearest(key, known | BESIDE)}", key)
        try:
            values[key] = _adapter(kinds[key]).validate_json(json.dumps(value))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise GymError(f"got {value!r:.80}: {place}{': ' if place else ''}{first['msg']}", key) from error
    return values
