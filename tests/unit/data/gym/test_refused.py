"""The refusals and the guards against the library itself: each data set that is refused does what is said of
it, and no scorer runs an answer as a program."""

import importlib
import re
import warnings
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from typing import Any

import pytest

from megatron_troll.data.gym.library import GymError, first_seed, harmless, judged, open_set
from megatron_troll.data.gym.refused import REFUSED

Entry = dict[str, Any]


def library() -> Any:
    """The register of its data sets, as it is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("reasoning_gym.factory")


WRONG: dict[str, Callable[[Entry], str]] = {
    "coin_flip": lambda entry: entry["answer"][:1],
    "complex_arithmetic": lambda entry: "nan",
    "game_of_life_halting": lambda entry: "no idea",
    "propositional_logic": lambda entry: entry["metadata"]["premises"][0],
    "puzzle24": lambda entry: "6*2 + 6 + 6",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_earn_full_marks(name: str) -> None:
    opened = library().create_dataset(name, seed=7, size=12)
    entries = [opened[i] for i in range(12)]
    wrong = [(WRONG[name](entry), entry) for entry in entries]
    right = sum(opened.score_answer(text, entry) == 1 for text, entry in wrong if text != entry["answer"])
    assert right >= 6


def test_a_target_of_boxnet_may_come_to_its_box() -> None:
    opened = library().create_dataset("boxnet", seed=7, size=1)
    board = {"0.5_0.5": ["box_red"], "0.5_1.5": ["target_red"]}
    plan = (
        '[{"Agent[0.5, 1.5]": "move(target_red, square[0.5, 0.5])"}, '
        '{"Agent[0.5, 0.5]": "move(box_red, target_red)"}]'
    )
    assert opened.score_answer(plan, {"answer": None, "metadata": {"initial_state": board}}) == 1


def test_time_intervals_hold_the_day() -> None:
    opened = library().create_dataset("time_intervals", seed=7, size=40)
    assert any(str(date.today()) in opened[i]["metadata"]["start_time"] for i in range(40))


def test_each_is_refused_by_name_with_the_reason() -> None:
    assert REFUSED.keys() - WRONG.keys() == {"boxnet", "composite", "time_intervals"}
    for name, reason in REFUSED.items():
        with pytest.raises(GymError, match=f"{name} is refused: {re.escape(reason)}"):
            open_set(name, {})


PROGRAMS = [
    ("binary_matrix", "[[0]] + [seen.append(1) or [0]]"),
    ("spiral_matrix", "[seen.append(1)]"),
    ("string_insertion", "[str(seen.append(1))]"),
    ("n_queens", "[[seen.append(1)]]"),
    ("countdown", "seen.append(1)"),
    ("simple_integration", "seen.append(1)"),
    ("intermediate_integration", "seen.append(1)"),
    ("polynomial_multiplication", "seen.append(1)"),
]


@pytest.mark.parametrize(("name", "text"), PROGRAMS)
def test_an_answer_is_no_program(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`seen` is a built-in name while the answer is judged, so that a scorer that ran it would reach it."""
    seen: list[int] = []
    opened = open_set(name, {}, first=3)
    monkeypatch.setattr("builtins.seen", seen, raising=False)
    assert judged(opened, name, text, opened[0]) < 1
    assert not seen


FORMULAS = [
    ("countdown", "82 + 20*(3 - 1)/2", True),
    ("countdown", "2**3", False),
    ("countdown", "7//2", False),
    ("countdown", "Max(3, 4)", False),
    ("simple_integration", "-9*x**8/10 + 1.5*x + C", True),
    ("simple_integration", "integrate(2*x, x)", False),
    ("simple_integration", "Integral(2*x, x)", False),
    ("simple_integration", "x.diff(x)", False),
    ("simple_integration", "__import__('os')", False),
    ("intermediate_integration", "x*asin(3*x) + sqrt(1 - 9*x**2)/3 + C", True),
    ("polynomial_multiplication", "expand((x + 1)*(x + 2))", False),
    ("chain_sum", "__import__('os')", True),
]


@pytest.mark.parametrize(("name", "text", "seen"), FORMULAS)
def test_only_formulas_reach_a_parser(name: str, text: str, seen: bool) -> None:
    assert harmless(name, text) == seen


def test_an_integral_that_is_only_asked_for_earns_nothing() -> None:
    opened = open_set("simple_integration", {}, first=3)
    entry = opened[0]
    asked = f"Integral({entry['metadata']['integrand']}, {entry['metadata']['variable']})"
    assert opened.score_answer(asked, opened[0]) == 1
    assert judged(opened, "simple_integration", asked, opened[0]) == 0
    assert judged(opened, "simple_integration", entry["answer"], opened[0]) == 1


def test_no_two_ranges_of_items_meet() -> None:
    last = 2**18 - 1
    ranges = sorted(
        (first_seed(seed, level, held), first_seed(seed, level, held) + last)
        for seed in range(128)
        for level in range(64)
        for held in (False, True)
    )
    assert all(end < begin for (_, end), (begin, _) in pairwise(ranges))
    assert 0 <= ranges[0][0] < ranges[-1][1] < 2**32
