"""Columns that the configuration names, in files of every format, and what is said of missing ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_troll.config import ConfigError, Data, EvalSet
from megatron_troll.config.load import assemble
from megatron_troll.data.prompts import PromptSet, load_prompts
from megatron_troll.data.reader import Counts, Reader
from megatron_troll.data.rows import DataError, read_rows
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Prompt

NESTED = {
    "turns": [{"from": "human", "text": "sort 21"}, {"from": "model", "text": "12"}],
    "task": {"gold": {"value": 12}},
    "uuid": "a",
}


def read(path: str, tokenizer: Any, **config: Any) -> tuple[list[Prompt], Counts]:
    data = Data.model_validate({"files": (path,)} | config)
    reader = Reader(data, "data", ChatTemplate(tokenizer))
    return reader.files((path,), data.mixture[""]), reader.counts


def refusal(path: str, tokenizer: Any, **config: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, tokenizer, **config)
    return str(caught.value)


def arrow(path: Path, table: pa.Table, new: Any = pa.ipc.new_stream) -> str:
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)
    return str(path)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    table = pa.Table.from_pylist(rows)
    if path.name == "file.arrow":
        return arrow(path, table, pa.ipc.new_file)
    if path.suffix == ".arrow":
        return arrow(path, table)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "lines.json", "a.parquet", "stream.arrow", "file.arrow"]
)
def test_columns_inside_others_are_found_in_every_format(name: str, tmp_path: Path, tokenizer: Any) -> None:
    path = written(tmp_path / name, [NESTED, NESTED | {"uuid": "b", "turns": NESTED["turns"][1:]}])
    if name == "lines.json":
        Path(path).write_text("\n".join(map(json.dumps, json.loads(Path(path).read_text()))))
    columns = {"prompt": "turns.0.text", "answer": "task.gold.value", "id": "uuid"}
    prompts, _ = read(path, tokenizer, columns=columns)
    assert [(one.id, one.messages[0].content, one.answer) for one in prompts] == [
        ("a", "sort 21", "12"),
        ("b", "12", "12"),
    ]
    assert prompts[0].record == {key: NESTED[key] for key in ("turns", "task")}


def test_chats_are_lists_of_turns_or_turns_of_lists(tmp_path: Path, tokenizer: Any) -> None:
    chat = [
        {"role": "system", "content": "sort"},
        {"role": "user", "content": [{"type": "text", "text": "21"}]},
    ]
    apart = {"role": ["system", "user"], "content": ["sort", "21"]}
    rows = [{"id": str(i), "messages": value, "answer": "12"} for i, value in enumerate([chat, apart, "21"])]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    prompts, counts = read(str(path), tokenizer)
    assert [(one.role, one.content) for one in prompts[0].messages] == [("system", "sort"), ("user", "21")]
    assert counts.duplicates == 1
    assert [one.role for one in prompts[1].messages] == ["user"]


def test_arrays_categories_and_maps_are_read_as_what_they_hold(tmp_path: Path, tokenizer: Any) -> None:
    table = pa.table(
        {
            "prompt": pa.array(["sort 21", "sort 31"]).dictionary_encode(),
            "label": pa.array([np.array([12]), np.array([13])]),
            "at": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(4, dtype=np.int16).reshape(2, 1, 2)),
            "extra": pa.array([[("level", 1)], [("level", 2)]], pa.map_(pa.string(), pa.int64())),
        }
    )
    path = arrow(tmp_path / "a.arrow", table)
    (prompt,), counts = read(path, tokenizer, where={"extra.level": 2})
    assert (prompt.messages[0].content, prompt.answer) == ("sort 31", "13")
    assert prompt.record == {"label": [13], "at": [2, 3], "extra": {"level": 2}}
    assert counts.left_out == 1


FORMS = [
    ("gsm8k", "30 + 4\n#### 1,034", "1034"),
    ("boxed", r"\boxed{1} or \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
    ("text", " 12", " 12"),
    (None, "#### 12", "#### 12"),
    ("none", "12", ""),
]


@pytest.mark.parametrize(("form", "written", "answer"), FORMS)
def test_answers_are_taken_out_of_solutions(
    form: str, written: str, answer: str, write_jsonl: Any, tokenizer: Any
) -> None:
    path = write_jsonl("a.jsonl", {"asked": "sort 21", "solved": written})
    columns = {"prompt": "asked"} | ({} if form == "none" else {"answer": "solved"})
    ((prompt,), _) = read(path, tokenizer, columns=columns, answer_form=form)
    assert prompt.answer == answer
    assert prompt.record["solved"] == written


ROW = {"question": "sort 21", "answer": "12", "level": 1}
ABSENT = [
    (
        {"columns": {"prompt": "questoin", "answer": "answer"}},
        "line 1: no column 'questoin'; did you mean 'question'? (columns.prompt of data); the first row: "
        "question='sort 21', answer='12', level=1 (data.malformed=skip",
    ),
    (
        {"columns": {"id": "unique_id"}},
        "no column 'unique_id'; known: answer, level, question (columns.id of data)",
    ),
    (
        {"where": {"levle": 3}},
        "no column 'levle'; did you mean 'level'? (where of data); the first row: question=",
    ),
    ({"where": {"level": True}}, "no usable prompt; 2 rows, 2 left out by `where` (first: "),
    ({"where": {"level": "3"}}, "no usable prompt; 2 rows, 2 left out by `where` (first: "),
    (
        {"schema": "dapo"},
        "no column 'prompt'; known: answer, level, question; the first row: question='sort 21'",
    ),
    ({"answer_form": "boxed"}, r"line 1: the column 'answer' has no \boxed{} that closes: '12'"),
    ({"answer_form": "gsm8k"}, "line 1: the column 'answer' has no '#### ANSWER': '12'"),
]


@pytest.mark.parametrize(("config", "said"), ABSENT)
def test_what_is_not_there_is_named(
    config: dict[str, Any], said: str, write_jsonl: Any, tokenizer: Any
) -> None:
    path = write_jsonl("a.jsonl", ROW, ROW | {"question": "sort 31"})
    assert said in refusal(path, tokenizer, **config)


def test_a_later_row_without_a_column_shows_the_first(write_jsonl: Any, tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", ROW, {"question": "sort 31", "anwser": "13"}, ROW | {"answer": None})
    said = refusal(path, tokenizer)
    assert f"{path} line 2: no column 'answer'; did you mean 'anwser'?" in said
    assert "the first row: question='sort 21', answer='12'" in said
    prompts, counts = read(path, tokenizer, malformed="skip")
    assert (len(prompts), counts.malformed) == (1, 2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"problem": "sort 21", "level": 3},
            "there is no answer that a schema knows: beside problem none of expected_answer, answer, "
            "solution with \\boxed{}: name the columns, data.columns={prompt: COLUMN, answer: COLUMN}, or "
            "set data.answer_form=none for a reward that needs none; the first row: problem='sort 21', "
            "level=3",
        ),
        ({"problem": "sort 21", "answer": None}, "line 1: the column 'answer' is empty"),
        (
            {"problem": "sort 21", "answer": ["12", "13"]},
            "the column 'answer' holds 2 values, and one is expected",
        ),
        ({"problem": "sort 21", "answer": True}, "must hold text that is not empty, got True"),
        ({"problem": None, "answer": "12"}, "the column 'problem' is empty"),
        ({"problem": {"a": 1}, "answer": "12"}, "'problem' must be a list of chat messages, got {'a': 1}"),
    ],
)
def test_a_set_without_answers_or_prompts_is_refused(
    row: dict[str, Any], said: str, write_jsonl: Any, tokenizer: Any
) -> None:
    assert said in refusal(write_jsonl("a.jsonl", row), tokenizer)


def test_solutions_of_gsm8k_are_no_answers_because_the_first_row_has_no_mark(
    write_jsonl: Any, tokenizer: Any
) -> None:
    path = write_jsonl("a.jsonl", ROW, {"question": "sort 31", "answer": "so\n#### 13"})
    said = refusal(path, tokenizer)
    assert f"{path} line 2: the column 'answer' holds '####', and that of the first row does not" in said
    prompts, _ = read(path, tokenizer, answer_form="text")
    assert [prompt.answer for prompt in prompts] == ["12", "so\n#### 13"]
    assert "line 1: the column 'answer' has no '#### ANSWER'" in refusal(path, tokenizer, schema="gsm8k")


def test_a_set_without_answers_is_read_if_the_reward_needs_none(write_jsonl: Any, tokenizer: Any) -> None:
    ((prompt,), _) = read(write_jsonl("a.jsonl", {"problem": "sort 21"}), tokenizer, answer_form="none")
    assert (prompt.messages[0].content, prompt.answer) == ("sort 21", "")


def mixed(write_jsonl: Any, tokenizer: Any, **data: Any) -> PromptSet:
    one = write_jsonl("a.jsonl", {"q": "sort 1", "s": r"\boxed{1}", "split": "x"}, {"q": "sort 2", "s": "2"})
    two = write_jsonl("b.jsonl", {"q": "sort 3", "gold": "3"}, {"q": "sort 4", "gold": "4"})
    three = write_jsonl("c.jsonl", {"problem": "sort 5", "answer": "5"}, {"problem": "sort 6", "answer": "6"})
    sources = {
        "one": {"files": (one,), "where": {"split": "x"}, "answer_form": "boxed"},
        "three": {"files": (three,), "schema": "math"},
        "two": {"files": (two,), "columns": {"answer": "gold"}},
    }
    config = {"sources": sources, "columns": {"prompt": "q", "answer": "s"}, "held_out": {"two": 1}} | data
    return load_prompts(Data.model_validate(config), 0, ChatTemplate(tokenizer))


def test_a_source_takes_over_the_columns_that_it_does_not_name(write_jsonl: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"no column 'split'; known: q, s \(where of data\.sources\.one\)"):
        mixed(write_jsonl, tokenizer)
    found = mixed(write_jsonl, tokenizer, malformed="skip")
    answers = {
        source.name: sorted(p.answer for p in source.train + source.held_out) for source in found.sources
    }
    assert answers == {"one": ["1"], "two": ["3", "4"], "three": ["5", "6"]}


BAD = [
    (
        "{files: [a], columns: {prompt: q}}",
        "got columns.prompt=q alone: name columns.answer too, or answer_form=",
    ),
    (
        "{files: [a], columns: {answer: s}}",
        "got columns.answer=s alone: name columns.prompt too, or the schema",
    ),
    ("{sources: {x: {files: [a], columns: {answer: s}}}}", "sources.x: got columns.answer=s alone"),
    ("{files: [a], columns: {anwser: s}}", "data.columns.anwser: unknown key; did you mean 'answer'?"),
    (
        "{files: [a], columns: {prompt: q, answer: s}, answer_form: none}",
        "answer_form=none and columns.answer=s",
    ),
    ("{gym: chain_sum, where: {level: 3}}", "got where beside gym: they are for files"),
    (
        "{files: [a], answer_form: box}",
        "data.answer_form: got 'box', expected one of text, gsm8k, boxed, none",
    ),
    (
        "{files: [a], schema: maths}",
        "expected one of auto, dapo, gsm8k, livecodebench, math, messages, nemo_rl",
    ),
]


@pytest.mark.parametrize(("data", "said"), BAD)
def test_a_wrong_configuration_is_refused_by_key(data: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        assemble([], ["name=a", "models.policy.path=p", f"data={data}"])
    assert said in str(caught.value)


def test_an_evaluation_has_columns_of_its_own(write_jsonl: Any, tokenizer: Any) -> None:
    path = write_jsonl("a.jsonl", {"q": "sort 21", "s": "12"})
    one = EvalSet.model_validate({"files": (path,), "columns": {"prompt": "q", "answer": "s"}})
    (prompt,) = Reader(one, "eval.x", ChatTemplate(tokenizer)).files((path,), one)
    assert prompt.answer == "12"
    with pytest.raises(ValueError, match=r"columns\.prompt=q alone"):
        EvalSet.model_validate({"files": (path,), "columns": {"prompt": "q"}})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "not valid JSON: Expecting ':' delimiter at line 2 column 7"),
        ("a.json", b"[]", "the file holds no records"),
        ("a.arrow", b"not arrow at all, at all", "cannot be read as Arrow after row 0"),
        ("a.arrow", b"ARROW1\0\0 and no more", "cannot be read as Arrow after row 0"),
    ],
)
def test_files_that_cannot_be_read(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / name))
    assert str(caught.value).startswith(f"{tmp_path / name}: {said}")


def test_every_cut_of_an_arrow_file_and_a_wrong_offset_are_refused(tmp_path: Path) -> None:
    path = Path(arrow(tmp_path / "a.arrow", pa.table({"q": ["sort 1", "sort 2"]}), pa.ipc.new_file))
    whole = path.read_bytes()
    for length in range(0, len(whole), 61):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"Arrow|no records"):
            list(read_rows(path))
    offsets = np.array([0, 6, 12], dtype=np.int32).tobytes()
    path.write_bytes(whole.replace(offsets, np.array([0, 2**30, 12], dtype=np.int32).tobytes()))
    with pytest.raises(DataError, match="cannot be read as Arrow"):
        list(read_rows(path))


def test_an_entry_of_a_json_list_that_is_no_row_is_malformed(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([ROW, 3, {"question": "\ud83d", "answer": "1"}]))
    rows = list(read_rows(path))
    assert [(row.where, row.problem is None) for row in rows] == [
        (f"{path} row 1", True),
        (f"{path} row 2", False),
        (f"{path} row 3", False),
    ]
