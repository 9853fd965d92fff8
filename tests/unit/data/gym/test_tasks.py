"""Tasks of reasoning-gym as sources of a mixture: disjoint, the same everywhere, refused by key."""

import os
import subprocess
from importlib.metadata import PackageNotFoundError
from typing import Any

import pytest

from megatron_troll.config import ConfigError, Data, Gym
from megatron_troll.data.gym import tasks
from megatron_troll.data.gym.tasks import ASKED, Wanted, make
from megatron_troll.data.prompts import PromptSet, load_prompts
from megatron_troll.data.reader import Reader
from megatron_troll.data.rows import DataError
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Prompt

SUMS = {"name": "chain_sum", "max_terms": 2, "max_digits": 1}


def loaded(printable: Any, **config: Any) -> PromptSet:
    return load_prompts(Data.model_validate(config), 0, ChatTemplate(printable))


def refusal(printable: Any, gym: Any, **config: Any) -> str:
    with pytest.raises((ConfigError, DataError)) as caught:
        loaded(printable, sources={"sums": {"gym": gym}}, **config)
    return str(caught.value)


@pytest.mark.usefixtures("in_process")
def test_files_and_tasks_are_one_mixture(printable: Any, write_jsonl: Any) -> None:
    rows = [{"messages": [{"role": "user", "content": f"count {i}"}], "answer": str(i)} for i in range(5)]
    sources = {
        "files": {"files": (write_jsonl("a.jsonl", *rows),)},
        "sums": {"gym": SUMS | {"size": 20, "max_digits": 3}, "weight": 3.0},
    }
    found = loaded(printable, sources=sources, held_out={"files": 1, "sums": 8})
    of = {source.name: source for source in found.sources}
    assert {name: len(source.held_out) for name, source in of.items()} == {"files": 1, "sums": 8}
    prompt = of["sums"].train[0]
    question = prompt.record["question"]
    assert (prompt.id, prompt.source) == ("sums/0", "sums")
    assert prompt.messages[0].content == f"{question}\n\n{ASKED}"
    assert str(eval(question.split(":")[1].strip(" ="))) == prompt.answer
    assert prompt.record["gym"] == {"set": "chain_sum", "options": {"max_terms": 2, "max_digits": 3}}
    assert prompt.record["metadata"]["source_dataset"] == "chain_sum"
    assert of["sums"].held_out[0].id == "sums/held-out-0"


@pytest.mark.usefixtures("in_process")
def test_no_held_out_question_is_trained_on_and_none_comes_twice(printable: Any) -> None:
    """200 questions: made from different seeds, most of them still come on both sides."""
    found = loaded(printable, gym=SUMS | {"size": 600}, held_out=50)
    train, held = ({p.messages for p in part} for part in (found.train, found.held_out))
    assert (len(found.held_out), len(held)) == (50, 50)
    assert len(train) == len(found.train)
    assert not train & held
    counts = found.counts["tasks"]
    assert counts.held_out > 50
    assert counts.held_out + counts.duplicates + len(found.train) == 600
    assert f"{counts.held_out} left out, because they are held out" in str(found)


@pytest.mark.usefixtures("in_process")
def test_what_a_file_holds_out_is_no_task(printable: Any, write_jsonl: Any) -> None:
    alone = loaded(printable, gym=SUMS | {"size": 20}, held_out=2)
    same = {"messages": [{"role": "user", "content": alone.train[3].messages[0].content}], "answer": "1"}
    other = {"messages": [{"role": "user", "content": "count"}], "answer": "1"}
    sources = {"z": {"files": (write_jsonl("a.jsonl", other),)}, "sums": {"gym": SUMS | {"size": 20}}}
    held_out = {"z": (write_jsonl("h.jsonl", same),), "sums": 2}
    found = loaded(printable, sources=sources, held_out=held_out)
    assert found.counts["sums, tasks"].held_out == 1 + alone.counts["tasks"].held_out
    assert same["messages"][0]["content"] not in {p.messages[0].content for p in found.train}


@pytest.mark.usefixtures("in_process")
def test_another_seed_gives_other_tasks(printable: Any) -> None:
    hard = {"name": "chain_sum", "min_digits": 8, "max_digits": 9, "size": 30}
    one, other = (loaded(printable, gym=hard | {"seed": seed}, held_out=30) for seed in (0, 1))
    texts = [{p.messages for p in part} for part in (one.train, one.held_out, other.train, other.held_out)]
    assert len(set.union(*texts)) == 120
    assert loaded(printable, gym=hard, held_out=30).train == one.train


@pytest.mark.usefixtures("in_process")
def test_the_same_tasks_in_two_sources_leave_nothing_for_the_second(printable: Any) -> None:
    twice = {"a": {"gym": SUMS | {"size": 9}}, "b": {"gym": SUMS | {"size": 9}}}
    with pytest.raises(
        DataError, match=r"data\.sources\.b\.gym: no usable prompt; 9 rows, 9 duplicates dropped"
    ):
        loaded(printable, sources=twice, held_out={"a": 2})


BAD = [
    ("chainsum", {}, "data.sources.sums.gym.name: reasoning-gym has no data set 'chainsum'; did you mean"),
    (
        SUMS | {"max_term": 2},
        {},
        "data.sources.sums.gym.max_term: chain_sum has no option 'max_term'; did you",
    ),
    (
        SUMS | {"max_terms": "2"},
        {},
        "data.sources.sums.gym.max_terms: got '2': Input should be a valid integer",
    ),
    (SUMS | {"min_terms": 7}, {}, "data.sources.sums.gym: chain_sum: max_terms must be >= min_terms"),
    ("puzzle24", {}, "data.sources.sums.gym.name: puzzle24 is refused: its scorer does not look which"),
    (SUMS, {"held_out": 500}, "data.sources.sums.gym: chain_sum has only"),
    (
        SUMS,
        {"held_out": 9, "max_prompt_tokens": 50},
        "data.sources.sums.gym (chain_sum) held-out item 0: prompt",
    ),
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("gym", "config", "said"), BAD)
def test_it_is_refused_by_its_key(printable: Any, gym: Any, config: dict[str, Any], said: str) -> None:
    message = refusal(printable, gym, **config)
    assert message.startswith(said)
    assert len(message.splitlines()) == 1


@pytest.mark.usefixtures("in_process")
def test_a_set_whose_scorer_raises_on_its_own_answer_is_refused_by_name(
    printable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reasoning_gym.arithmetic.chain_sum import ChainSumDataset

    def raising(*given: Any) -> float:
        raise KeyError("difficulty")

    monkeypatch.setattr(ChainSumDataset, "score_answer", raising)
    said = "item 0: the scorer of chain_sum raises on its own answer"
    assert said in refusal(printable, SUMS, held_out=5)
    only_trained_on = SUMS | {"size": 20}
    with pytest.raises(
        DataError, match=r"data\.gym: no usable prompt; 20 rows, 20 malformed skipped \(first:"
    ):
        tasks_only(printable, only_trained_on, malformed="skip")
    with pytest.raises(DataError) as caught:
        tasks_only(printable, only_trained_on)
    assert str(caught.value).startswith(f"data.gym (chain_sum) {said}")


def tasks_only(printable: Any, gym: dict[str, Any], **config: Any) -> list[Prompt]:
    """The training prompts of a source that holds none out."""
    made = make({"": Wanted("data.gym", Gym.model_validate(gym), True, 0)})[""]
    reader = Reader(Data.model_validate({"gym": gym} | config), "data", ChatTemplate(printable))
    return reader.tasks(made.train[0], made.to_prompt)


def test_files_of_held_out_tasks_are_refused() -> None:
    for config in ({"gym": SUMS}, {"sources": {"sums": {"gym": SUMS}}}):
        with pytest.raises(ValueError, match=r"tasks of (gym|sums) are made: give their number, not files"):
            Data.model_validate(config | {"held_out": ("a.jsonl",)})


def test_a_source_is_files_or_tasks() -> None:
    with pytest.raises(ValueError, match="got files and gym, expected exactly one of the keys files or gym"):
        Data.model_validate({"sources": {"a": {"gym": SUMS, "files": ("a.jsonl",)}}})


def test_the_library_must_be_there_in_the_release_that_was_tried(
    printable: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(tasks, "version", missing)
    assert refusal(printable, SUMS) == (
        "data.sources.sums.gym: reasoning-gym is not installed: install megatron-troll[gym]"
    )
    monkeypatch.setattr(tasks, "version", lambda name: "0.2.0")
    assert "reasoning-gym 0.2.0 is installed; whether scorers can be trusted" in refusal(printable, SUMS)


def test_a_process_that_fails_is_told(printable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(argv, -9, "", "a\nMemoryError")

    monkeypatch.setattr(tasks.subprocess, "run", fail)
    assert "makes the tasks ended with exit code -9:\na\nMemoryError" in refusal(printable, SUMS)


def test_every_process_makes_the_same_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """These sets order what they draw by hashes of texts, which differ from process to process."""
    names = ("isomorphic_strings", "polynomial_multiplication", "ransom_note", "word_ladder")
    wanted = {name: Wanted("data.gym", Gym(name=name, size=3), True, 2) for name in names}
    found = []
    for seed in ("1", "2"):
        monkeypatch.setitem(os.environ, "PYTHONHASHSEED", seed)
        found.append({name: (one.train, one.held_out) for name, one in make(wanted).items()})
    assert found[0] == found[1]
    assert all(len(train[0]) == 3 and len(held) == 2 for train, held in found[0].values())


@pytest.mark.usefixtures("in_process")
def test_a_curriculum_has_prompts_of_every_level_and_holds_out_those_of_the_last(printable: Any) -> None:
    """The set's own levels: two terms of one digit, up to three of two, up to four of three."""
    rising = {"name": "chain_sum", "size": 40, "curriculum": {"first": 1, "last": 2, "window": 8}}
    found = loaded(printable, sources={"sums": {"gym": rising}}, held_out=10)
    (source,) = found.sources
    assert [prompts[0].id for prompts in source.levels] == ["sums/1-0", "sums/2-0"]
    assert source.first_level == 1
    digits = [
        {p.record["metadata"]["num_digits"] for p in prompts} for prompts in (*source.levels, source.held_out)
    ]
    assert digits == [{1, 2}, {1, 2, 3}, {1, 2, 3}]
    assert source.held_out[0].id == "sums/held-out-2-0"
    assert source.levels[1][0].record["gym"] == {"set": "chain_sum", "options": {}, "level": 2}
    held = {prompt.messages for prompt in found.held_out}
    assert not any(prompt.messages in held for prompt in found.train)
    assert "sums, tasks of level 2: 40 rows" in str(found)


LEVELS = [
    ({"curriculum": {"last": 40}}, "data.gym.curriculum.last: chain_sum has the levels 0 to 10, and not 40"),
    (
        {"curriculum": {"first": 11}},
        "data.gym.curriculum.first: chain_sum has the levels 0 to 10, and not 11",
    ),
    ({"curriculum": {}, "max_terms": 3}, "data.gym.max_terms: is set by the curriculum: leave it out, or"),
    ({"name": "acre", "curriculum": {}}, "data.gym.curriculum: acre has no levels"),
    (
        {"name": "caesar_cipher", "curriculum": {}},
        "data.gym: caesar_cipher at level 2: rotation must be in range",
    ),
]


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(("options", "said"), LEVELS)
def test_levels_that_there_are_not_are_refused(printable: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loaded(printable, gym={"name": "chain_sum", "size": 5} | options, held_out=2)
    assert str(caught.value).startswith(said)
