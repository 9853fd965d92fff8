"""Items as they are made, tried and stored; sets that are not to be trusted are refused by name."""

import json
from fractions import Fraction
from typing import Any

import pytest

from megatron_troll.data.gym import make
from megatron_troll.data.gym.encoding import decode, encode
from megatron_troll.data.gym.library import item, open_set
from megatron_troll.data.gym.make import Job, made


def job(name: str, count: int = 3, held_out: bool = False, levels: Any = None, **options: Any) -> Job:
    return Job("data.gym", name, options, 0, count, held_out, levels)


def rows(answer: dict[str, Any], part: int = 0) -> list[dict[str, Any]]:
    assert "problem" not in answer, answer
    return answer["parts"][part]["rows"]


def questions(answer: dict[str, Any], part: int = 0) -> list[str]:
    return [row["entry"]["question"] for row in rows(answer, part)]


def test_an_item_is_made_from_its_seed() -> None:
    found = made(job("chain_sum", 6))
    moved = open_set("chain_sum", {}, first=2, size=4)
    assert questions(found)[2:] == [item(moved, i, 2)["question"] for i in range(4)]
    assert [row["problem"] for row in rows(found)] == [None] * 6
    assert rows(found)[0]["entry"].keys() == {"question", "answer", "metadata"}


def test_what_a_set_draws_from_the_generators_of_the_process_is_fixed_too() -> None:
    assert rows(made(job("list_functions", 12))) == rows(made(job("list_functions", 12)))


def test_held_out_questions_are_distinct() -> None:
    """One digit and two terms: 200 questions at most."""
    found = questions(made(job("chain_sum", 100, held_out=True, max_terms=2, max_digits=1)))
    assert len(found) == len(set(found)) == 100
    refused = made(job("chain_sum", 500, held_out=True, max_terms=2, max_digits=1))
    assert "chain_sum has only" in refused["problem"]
    assert "too few to hold 500 out" in refused["problem"]


BAD = [
    (job("chainsum"), "name", "reasoning-gym has no data set 'chainsum'; did you mean 'chain_sum'?"),
    (
        job("chain_sum", max_term=3),
        "max_term",
        "chain_sum has no option 'max_term'; did you mean 'max_terms'?",
    ),
    (job("chain_sum", sizes=3), "sizes", "chain_sum has no option 'sizes'; did you mean 'size'?"),
    (job("chain_sum", max_terms="3"), "max_terms", "got '3': Input should be a valid integer"),
    (job("chain_sum", max_terms=1), "", "chain_sum: max_terms must be >= min_terms"),
    (job("puzzle24"), "name", "puzzle24 is refused: its scorer does not look which numbers are used"),
    (job("calendar_arithmetic", tasks=["nap"]), "", "calendar_arithmetic: Invalid tasks: nap"),
    (
        job("rush_hour", min_moves=900, max_moves=901),
        "",
        "rush_hour: No puzzles found with moves between 900",
    ),
]


@pytest.mark.parametrize(("asked", "option", "said"), BAD)
def test_a_set_or_an_option_that_is_wrong_is_named(asked: Job, option: str, said: str) -> None:
    answer = made(asked)
    assert answer["option"] == option
    assert answer["problem"].startswith(said)


def test_lists_become_what_a_set_wants() -> None:
    letters: Any = open_set("polynomial_multiplication", {"variables": ["a", "b"], "operators": ["+"]})
    assert (letters.config.variables, letters.config.operators) == (("a", "b"), ("+",))


class Broken:
    """A data set whose scorer fails in a way that a test chooses."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"question": f"q{index}", "answer": f"{index}00", "metadata": {}}

    def score_answer(self, answer: str | None, entry: dict[str, Any]) -> float:
        return self.scores(answer, entry["answer"])


def raises(answer: str, right: str) -> float:
    raise ZeroDivisionError("no marks")


SCORERS = [
    (raises, "the scorer of x raises on its own answer '000': ZeroDivisionError: no marks"),
    (lambda answer, right: 0.5, "the scorer of x gives its own answer '000' only 0.5"),
    (lambda answer, right: 7.0, "raises on its own answer '000': ValueError: the scorer of x gave 7.0"),
    (lambda answer, right: float("nan"), "the scorer of x gave nan, expected a number from 0 to 1"),
]


@pytest.mark.parametrize(("scores", "said"), SCORERS)
def test_an_item_whose_own_answer_is_not_right_is_malformed(
    scores: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make, "open_set", lambda *asked: Broken(scores))
    assert said in rows(made(job("x")))[0]["problem"]


def test_a_scorer_that_takes_one_text_for_most_questions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for scores, text in (
        (lambda answer, right: 1.0, "''"),
        (lambda answer, right: float(len(answer) == 3), "'nan'"),
    ):
        monkeypatch.setattr(make, "open_set", lambda *asked, scores=scores: Broken(scores))
        assert made(job("x", 20))["problem"] == (
            f"the scorer of x gives {text} full marks on 12 of 12 questions with another answer"
        )


def test_what_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever(*asked: Any) -> float:
        while True:
            pass

    monkeypatch.setattr(make, "ITEM_LIMIT_S", 0.05)
    monkeypatch.setattr(make, "open_set", lambda *asked: Broken(forever))
    assert "takes over 0.05 s for its own answer '000'" in rows(made(job("x")))[0]["problem"]
    monkeypatch.setattr(make, "item", forever)
    assert made(job("x"))["problem"] == "item 0 of x was not made within 0.05 s"
    monkeypatch.setattr(make, "open_set", forever)
    assert made(job("x"))["problem"] == "x was not made within 0.05 s"


VALUES = [
    {"a": [1, 2.5, None, True, "x"], "b": {"c": (1, (2, 3))}},
    {1: "one", (2, 3): {"set": {1, 2}}, "#tuple": [1]},
    [Fraction(1, 3), {"#odd": 1}],
    {},
]


@pytest.mark.parametrize("value", VALUES)
def test_what_json_lacks_comes_back_as_it_was(value: Any) -> None:
    assert decode(json.loads(json.dumps(encode(value)))) == value


def test_what_has_no_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="a object has no form in JSON"):
        encode({"a": [object()]})
    monkeypatch.setattr(make, "open_set", lambda *asked: [{"question": object()}])
    assert made(job("x"))["problem"] == "item 0 of x cannot be made: TypeError: a object has no form in JSON"


STORED = ("arc_agi", "gsm_symbolic", "graph_color", "rubiks_cube", "rush_hour", "tower_of_hanoi")


@pytest.mark.parametrize("name", STORED)
def test_scorers_judge_what_was_stored_as_what_was_made(name: str) -> None:
    """Their metadata hold tuples, numbers as keys and fractions."""
    assert [row["problem"] for row in rows(made(job(name, 4)))] == [None] * 4
