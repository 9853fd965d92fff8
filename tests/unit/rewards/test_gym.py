"""Answers to tasks of reasoning-gym: where they stand, what they earn, what a scorer does wrong."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_troll.config import RewardConfig
from megatron_troll.config.data import Origin
from megatron_troll.data.gym.encoding import encode
from megatron_troll.data.gym.library import open_set
from megatron_troll.data.gym.tasks import ASKED
from megatron_troll.rewards.answers import last_tagged
from megatron_troll.rewards.reward import Raised, VerifierCall, attempt, build, problem
from megatron_troll.rewards.terms import default
from megatron_troll.rewards.verifiers.gym import stated
from megatron_troll.types import Message, Prompt


def task(name: str, instruction: str = ASKED, **options: Any) -> Prompt:
    entry = encode(open_set(name, options, first=5)[0])
    chat = (Message("user", f"{entry['question']}\n\n{instruction}"),)
    return Prompt("t", chat, entry["answer"], {"gym": {"set": name, "options": options}, **entry})


STATED = [
    ("<answer>3</answer> or <answer> 4\n5 </answer>", ASKED, "4\n5"),
    (r"\boxed{3} <answer>4</answer>", r"in \boxed{}", "3"),
    (r"\boxed{3} <answer>4</answer>", r"not in \boxed{} but in <answer>", "4"),
    (" 7 ", "just answer", "7"),
    ("7", ASKED, None),
    ("7</answer>", ASKED, None),
    ("<answer>7", ASKED, None),
    (r"\boxed{7", r"in \boxed{}", None),
]


@pytest.mark.parametrize(("text", "asked", "found"), STATED)
def test_the_answer_stands_where_the_prompt_asks_for_it(text: str, asked: str, found: str | None) -> None:
    assert stated(text, asked) == found


def test_the_last_tag_that_closes() -> None:
    assert last_tagged("<a>1</a><a>2</a><a>3", "a") == "2"
    assert last_tagged("</a><a>", "a") is None


def test_full_and_partial_credit() -> None:
    prompt = task("chain_sum", max_terms=2, max_digits=1)
    full, partial = (
        build(RewardConfig.model_validate({"name": "gym", "credit": c})) for c in ("full", "partial")
    )
    right, close, wrong = (
        f"<answer>{text}</answer>" for text in (prompt.answer, f"it is {prompt.answer}", "999")
    )
    assert [full(text, prompt) for text in (right, close, wrong, prompt.answer)] == [1, 0, 0, 0]
    marks = [partial(text, prompt) for text in (right, close, wrong)]
    assert (marks[0], marks[2]) == (1, 0)
    assert 0 < marks[1] < 1


def test_a_scorer_reads_the_options_of_its_tasks() -> None:
    """Within one unit of the last place that the options name."""
    options: dict[str, Any] = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    prompt = task("decimal_arithmetic", **options)
    near = f"<answer>{float(prompt.answer) + 0.09:.2f}</answer>"
    exact = replace(prompt, record=prompt.record | {"gym": {"set": "decimal_arithmetic", "options": {}}})
    judge = build(RewardConfig(name="gym"))
    assert (judge(near, prompt), judge(near, exact)) == (1, 0)


def test_an_item_is_judged_anew_each_time() -> None:
    """This scorer writes into the item."""
    prompt = task("knight_swap", min_nodes=6, max_nodes=6)
    before = repr(prompt.record)
    judge = build(RewardConfig(name="gym"))
    assert [judge(f"<answer>{prompt.answer}</answer>", prompt) for _ in range(2)] == [1, 1]
    assert repr(prompt.record) == before


def test_what_a_scorer_raises_costs_only_that_answer() -> None:
    prompt = task("prime_factorization")

    judge = build(RewardConfig(name="gym"))
    calls = [VerifierCall(f"<answer>{text}</answer>", prompt, "reward") for text in ("none", prompt.answer)]
    failed, right = (attempt(call, judge) for call in calls)
    assert isinstance(failed, Raised)
    assert failed.what.startswith("ValueError: invalid literal for int()")
    assert right == 1


def test_a_record_of_a_file_is_malformed() -> None:
    found = problem(build(RewardConfig(name="gym")), Prompt("p", (), "3", {"answer": "3"}))
    assert found == "the record has no gym, question, metadata: it is no task of a `gym` source"


def test_votes_are_what_is_tagged_boxed_or_said() -> None:
    judge: Any = build(RewardConfig(name="gym"))
    assert [judge.vote(t) for t in ("so <answer> 3 </answer>", r"so \boxed{4}", " 5 ")] == ["3", "4", "5"]


def test_tasks_are_judged_by_their_scorer_unless_their_source_names_another() -> None:
    run = RewardConfig(name="regex", pattern="1", timeout_s=3.0, reasoning="keep")  # pyright: ignore[reportCallIssue]
    tasks = default(run, Origin.model_validate({"gym": "chain_sum"}))
    assert (tasks.name, tasks.timeout_s, tasks.reasoning, tasks.fields) == ("gym", 3.0, "keep", {})
    assert default(run, Origin(files=("a.jsonl",))) is run
    partial = RewardConfig.model_validate({"name": "gym", "credit": "partial"})
    assert default(partial, Origin.model_validate({"gym": "chain_sum"})) is partial
