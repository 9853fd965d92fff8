"""Named sources: what they share, what is their own, and what they are refused for."""

from pathlib import Path
from typing import Any

import pytest

from megatron_troll.config import ConfigError, Data
from megatron_troll.config.document import parse
from megatron_troll.config.load import assemble, load
from megatron_troll.data.prompts import PromptSet, load_prompts
from megatron_troll.data.reader import instructed
from megatron_troll.data.rows import DataError
from megatron_troll.data.template import ChatTemplate
from megatron_troll.task import prepare
from tests.unit.demo_task import line


def record(number: int, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"sort {number}"}]
    return {"id": str(number), "messages": turns, "answer": str(number)} | fields


def loaded(tokenizer: Any, **config: Any) -> PromptSet:
    return load_prompts(Data.model_validate(config), 0, ChatTemplate(tokenizer))


def test_prompts_know_their_source_and_ids_are_its_own(write_jsonl: Any, tokenizer: Any) -> None:
    a, b = write_jsonl("a.jsonl", *map(record, range(4))), write_jsonl("b.jsonl", *map(record, range(10, 14)))
    sources = {"one": {"files": (a,)}, "two": {"files": (b,), "weight": 2.0}}
    found = loaded(tokenizer, sources=sources, held_out=3)
    assert [source.name for source in found.sources] == ["one", "two"]
    assert {prompt.source for prompt in found.sources[0].train} == {"one"}
    assert all(prompt.id.startswith("two/1") for prompt in found.sources[1].train)
    assert [len(source.held_out) for source in found.sources] == [1, 2]
    assert "two, files: 4 rows" in str(found)


def test_the_order_in_which_sources_are_written_changes_nothing(write_jsonl: Any, tokenizer: Any) -> None:
    files = {
        name: {"files": (write_jsonl(name, *map(record, range(i * 9, i * 9 + 9))),)}
        for i, name in enumerate(("b.jsonl", "a.jsonl"))
    }
    one = loaded(tokenizer, sources=files, held_out=4)
    other = loaded(tokenizer, sources=dict(reversed(files.items())), held_out=4)
    assert (one.train, one.held_out) == (other.train, other.held_out)


def test_a_text_of_two_sources_counts_once_and_equal_ids_are_two_prompts(
    write_jsonl: Any, tokenizer: Any
) -> None:
    a = write_jsonl("a.jsonl", record(1), record(2))
    b = write_jsonl("b.jsonl", record(2), record(1, messages=[{"role": "user", "content": "sort 77"}]))
    held = write_jsonl("h.jsonl", record(5))
    found = loaded(tokenizer, sources={"a": {"files": (a,)}, "b": {"files": (b,)}}, held_out={"a": (held,)})
    assert [prompt.id for prompt in found.train] == ["a/1", "a/2", "b/1"]
    assert found.counts["b, files"].duplicates == 1
    assert [len(source.held_out) for source in found.sources] == [1, 0]


def test_an_instruction_joins_the_last_turn(write_jsonl: Any, tokenizer: Any) -> None:
    path, held = write_jsonl("a.jsonl", record(1), record(2)), write_jsonl("h.jsonl", record(3))
    found = loaded(tokenizer, files=(path,), held_out=(held,), instruction="please {question} now")
    assert found.train[0].messages[-1].content == "please sort 1 now"
    assert found.held_out[0].messages[-1].content == "please sort 3 now"
    mixed = loaded(
        tokenizer,
        sources={"a": {"files": (path,), "instruction": ""}, "b": {"files": (held,)}},
        instruction="also {question}",
        held_out={"a": 1},
    )
    assert [prompt.messages[-1].content for prompt in mixed.train] in (
        ["sort 1", "also sort 3"],
        ["sort 2", "also sort 3"],
    )


def test_a_system_turn_comes_before_every_prompt(write_jsonl: Any, tokenizer: Any) -> None:
    path, held = write_jsonl("a.jsonl", record(1), record(2)), write_jsonl("h.jsonl", record(3))
    found = loaded(tokenizer, files=(path,), held_out=(held,), system="be brief")
    plain = loaded(tokenizer, files=(path,), held_out=(held,))
    for with_system, without in ((found.train, plain.train), (found.held_out, plain.held_out)):
        first = with_system[0].messages[0]
        assert (first.role, first.content) == ("system", "be brief")
        assert with_system[0].messages[1:] == without[0].messages
        assert len(with_system[0].ids) > len(without[0].ids)
    own = write_jsonl(
        "o.jsonl", record(4, messages=[{"role": "system", "content": "a"}, *record(4)["messages"]])
    )
    sources = {"a": {"files": (path,)}, "o": {"files": (own,), "system": ""}}
    mixed = loaded(tokenizer, sources=sources, held_out={"a": 1}, system="be brief")
    assert [prompt.messages[0].content for prompt in mixed.train] == ["be brief", "a"]
    with pytest.raises(DataError, match="has a system turn of its own, 'a'"):
        loaded(tokenizer, files=(own,), held_out=(held,), system="be brief")


def test_a_held_out_prompt_of_one_source_may_not_be_a_training_prompt_of_another(
    write_jsonl: Any, tokenizer: Any
) -> None:
    a, b = write_jsonl("a.jsonl", record(1), record(2)), write_jsonl("b.jsonl", record(3), record(4))
    held = write_jsonl("h.jsonl", record(4))
    with pytest.raises(DataError, match="held-out prompt 'a/4' is also the training prompt 'b/4'"):
        loaded(tokenizer, sources={"a": {"files": (a,)}, "b": {"files": (b,)}}, held_out={"a": (held,)})


def test_an_instruction_without_a_place_for_the_question_follows_it() -> None:
    assert instructed("how many?", "Answer in {}.") == "how many?\n\nAnswer in {}."


def test_each_source_has_columns_and_a_reward_of_its_own(
    tmp_path: Path, base: Path, write_jsonl: Any
) -> None:
    one = write_jsonl(
        "one.jsonl", *({"asked": f"sort {i}", "solved": f"\\boxed{{{i}}}"} for i in range(40, 48))
    )
    two = write_jsonl("two.jsonl", *({"question": f"sort {i}", "answer": f"so {i}"} for i in range(60, 68)))
    (tmp_path / "run.yaml").write_text(
        f"name: trial\nmodels: {{policy: {{path: {base}, init: random, layout: {{tp: 2, ep: 2}}}}}}\n"
        f"data:\n  sources:\n    one: {{files: [{one}], columns: {{prompt: asked, answer: solved}}, "
        f"answer_form: boxed, reward: {{name: math_verify}}}}\n    two: {{files: [{two}]}}\n"
        "  held_out: 2\n  max_prompt_tokens: 32\n"
        "rollout: {prompts: 4, sampling: {max_tokens: 8}}\nreward: {name: exact}\n"
    )
    task = prepare(load(tmp_path / "run.yaml"))
    assert {name: reward.name for name, reward in task.rewards.items()} == {
        "one": "math_verify",
        "two": "exact",
    }
    answers = {source.name: {one.answer for one in source.train} for source in task.prompts.sources}
    assert answers["one"] < {str(i) for i in range(40, 48)}
    assert answers["two"] < {f"so {i}" for i in range(60, 68)}
    other = "data.sources.two.reward={name: regex, pattern: x, ignore: 'so 0123456789'}"
    with pytest.raises(DataError, match=r"two\.jsonl line 1: nothing is left of the answer 'so 60'"):
        prepare(load(tmp_path / "run.yaml", [other]))


BAD = [
    ("sources: {a: {files: [a.jsonl], weight: 0}}", "data.sources.a.weight: got 0, expected a number > 0"),
    ("sources: {a: {files: [a.jsonl], weight: -1}}", "data.sources.a.weight: got -1, expected a number > 0"),
    ("sources: {a: {files: [a]}, a: {files: [b]}}", "'a' is given twice (first in run.yaml line 3)"),
    ("sources: {}", "data: got none, expected exactly one of the keys files or gym or sources"),
    (
        "{files: [a.jsonl], sources: {a: {files: [b.jsonl]}}}",
        "data: got files and sources, expected",
    ),
    ("sources: {a: {weight: 2}}", "data.sources.a: got none, expected exactly one of the keys files"),
    ("sources: {a/b: {files: [a.jsonl]}}", "data.sources.a/b: got 'a/b', expected a name for metrics"),
    (
        "sources: {a: {files: [a.jsonl], wieght: 2}}",
        "sources.a.wieght: unknown key; did you mean 'weight'?",
    ),
    ("{sources: {a: {files: [a]}}, held_out: {b: 3}}", "held_out.b: no such source; known: a"),
    ("{sources: {a: {files: [a]}}, held_out: {}}", "held_out: got {}, expected one source or more"),
    (
        "{sources: {a: {files: [a]}, b: {files: [b]}}, held_out: [h]}",
        "files do not say of which source",
    ),
]


@pytest.mark.parametrize(("written", "said"), BAD)
def test_it_is_refused_by_key_and_line(written: str, said: str) -> None:
    data = written if written[0] == "{" else f"{{{written}}}"
    text = f"name: a\nmodels: {{policy: {{path: p}}}}\ndata: {data}\n"
    with pytest.raises(ConfigError) as caught:
        assemble([parse(text, "run.yaml")])
    assert said in str(caught.value)
    assert "run.yaml line 3" in str(caught.value)


def test_a_source_that_cannot_fill_its_share_of_a_batch_is_refused(tmp_path: Path, base: Path) -> None:
    for name, size in (("a", 3), ("b", 20)):
        (tmp_path / f"{name}.jsonl").write_text("".join(line(100 * size + i) for i in range(size)))
    (tmp_path / "run.yaml").write_text(
        f"name: trial\nmodels: {{policy: {{path: {base}, init: random, layout: {{tp: 2, ep: 2}}}}}}\n"
        f"data: {{sources: {{a: {{files: [{tmp_path}/a.jsonl], weight: 3}}, "
        f"b: {{files: [{tmp_path}/b.jsonl]}}}},"
        " held_out: {b: 2}, max_prompt_tokens: 32}\n"
        "rollout: {prompts: 8, sampling: {max_tokens: 8}}\n"
    )
    assert prepare(load(tmp_path / "run.yaml", ["rollout.prompts=4"])).rewards.keys() == {"a", "b"}
    said = "rollout.prompts=8 is more than the 6 that a batch draws of data.sources.a, which has 3"
    with pytest.raises(ConfigError, match=said):
        prepare(load(tmp_path / "run.yaml"))
