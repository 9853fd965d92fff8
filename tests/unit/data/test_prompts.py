"""Prompt files in every schema, and what is said of bad ones."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_troll.config import Data
from megatron_troll.data.prompts import load_prompts
from megatron_troll.data.reader import Reader
from megatron_troll.data.rows import DataError
from megatron_troll.data.template import ChatTemplate


def ours(number: int, text: str | None = None, answer: str = "1") -> dict:
    content = text if text is not None else f"sort {number}"
    return {"id": f"p{number}", "messages": [{"role": "user", "content": content}], "answer": answer}


def dapo(index, text: str, answer: str = "34") -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def read(path, tokenizer, **config):
    data = Data.model_validate({"files": (path,)} | config)
    reader = Reader(data, "data", ChatTemplate(tokenizer))
    return reader.files((path,), data), reader.counts


def refusal(path, tokenizer, **config) -> str:
    with pytest.raises(DataError) as caught:
        read(path, tokenizer, **config)
    return str(caught.value)


def test_our_own_schema(write_jsonl, tokenizer):
    path = write_jsonl("a.jsonl", ours(1, answer="x") | {"level": 3})
    (prompt,), _ = read(path, tokenizer)
    assert (prompt.id, prompt.answer) == ("p1", "x")
    assert [(message.role, message.content) for message in prompt.messages] == [("user", "sort 1")]
    assert prompt.record == {"answer": "x", "level": 3}


def test_dapo_parquet_keeps_the_record_and_drops_its_many_duplicates(tmp_path, tokenizer):
    rows = [dapo("uuid-1", "one"), dapo("uuid-2", "two")] * 100 + [dapo("uuid-3", "one", answer="35")]
    path = str(tmp_path / "dapo.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=64)
    prompts, counts = read(path, tokenizer)
    assert [prompt.id for prompt in prompts] == ["uuid-1", "uuid-2"]
    assert prompts[0].answer == "34"
    assert prompts[0].record["data_source"] == "math_dapo"
    assert (counts.rows, counts.duplicates, counts.conflicts) == (201, 199, 1)
    assert "199 duplicates dropped (1 with another answer)" in str(counts)


def test_gsm8k_as_published_and_as_prepared_for_verl(write_jsonl, tokenizer):
    raw = write_jsonl("raw.jsonl", {"question": "how many?", "answer": "9*2=<<9*2=18>>18\n#### 1,018"})
    (prompt,), _ = read(raw, tokenizer)
    assert (prompt.messages[0].content, prompt.answer) == ("how many?", "1018")
    prepared = dapo(7, "how many?", "18") | {"data_source": "openai/gsm8k"}
    prepared["extra_info"]["split"] = "train"
    for schema in ("auto", "gsm8k"):
        (prompt,), _ = read(write_jsonl("verl.jsonl", prepared), tokenizer, schema=schema)
        assert (prompt.id, prompt.answer) == ("openai/gsm8k/train/7", "18")


def test_a_prompt_without_an_id_is_named_by_its_content(write_jsonl, tokenizer):
    records = [{key: value for key, value in ours(n).items() if key != "id"} for n in (1, 2, 1)]
    prompts, counts = read(write_jsonl("a.jsonl", *records), tokenizer)
    assert len({prompt.id for prompt in prompts}) == 2
    assert counts.duplicates == 1


MALFORMED = [
    ("{not json", "line 3: not valid JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[1]", "line 3: expected an object, got list"),
    ({"messages": [], "answer": "1"}, "'messages' must be a list of one or more"),
    ({"messages": [{"role": "user"}], "answer": "1"}, "messages[0].content must be text, got None"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no column 'answer'; known: messages"),
    (ours(3) | {"answer": ""}, "the column 'answer' must hold text that is not empty"),
    (
        {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}], "answer": "1"},
        "messages[0] has keys that are not read: tool_calls",
    ),
    (
        {
            "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "answer": "1",
        },
        "ends with the assistant's turn",
    ),
    (ours(1, text="other"), "id 'p1' already names another prompt"),
]


@pytest.mark.parametrize(("record", "said"), MALFORMED)
def test_a_malformed_line_is_named_by_file_and_number(write_jsonl, tokenizer, record, said):
    path = write_jsonl("a.jsonl", ours(1), "", record, ours(4))
    message = refusal(path, tokenizer)
    assert message.startswith(f"{path} line 3: ")
    assert said in message
    assert "data.malformed=skip" in message


def test_malformed_lines_can_be_skipped_and_are_counted(write_jsonl, tokenizer):
    path = write_jsonl("a.jsonl", ours(1), "{not json", "[2]", ours(4))
    prompts, counts = read(path, tokenizer, malformed="skip")
    assert [prompt.id for prompt in prompts] == ["p1", "p4"]
    assert counts.malformed == 2
    assert f"2 malformed skipped (first: {path} line 2: not valid JSON" in str(counts)


def test_a_malformed_parquet_row_is_named_by_its_number(tmp_path, tokenizer):
    rows = [dapo("a", "one"), dapo("b", "two") | {"reward_model": {"ground_truth": None, "style": "rule"}}]
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert f"{path} row 2: the column 'reward_model.ground_truth' is empty" in refusal(path, tokenizer)


def test_bytes_that_are_not_utf8_are_malformed(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"messages": "\xff\xff"}\n')
    assert "line 1: not valid UTF-8" in refusal(str(path), tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"\n\n", "the file holds no records"),
        ("a.parquet", b"not parquet at all", "cannot be read as Parquet"),
        ("a.csv", b"a,b", "expected a file ending with .jsonl, .json, .parquet or .arrow"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, tokenizer, name, content, said):
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(str(path), tokenizer).startswith(f"{path}: {said}")


def test_a_missing_file(tmp_path, tokenizer):
    assert "no such file" in refusal(str(tmp_path / "none.jsonl"), tokenizer)


def test_a_file_of_no_known_schema(write_jsonl, tokenizer):
    message = refusal(write_jsonl("a.jsonl", {"text": "a"}), tokenizer)
    assert "no known schema has the columns text: name the columns, data.columns={prompt: COLUMN" in message
    assert "the first row: text='a'" in message


def test_too_long_prompts_are_refused_or_counted(write_jsonl, tokenizer):
    path = write_jsonl("a.jsonl", ours(1), ours(2, text="a" * 30))
    assert "prompt 'p2' has 33 tokens, over data.max_prompt_tokens=32" in refusal(
        path, tokenizer, max_prompt_tokens=32
    )
    prompts, counts = read(path, tokenizer, max_prompt_tokens=32, overlong_prompts="skip")
    assert (len(prompts), counts.overlong) == (1, 1)


def test_a_prompt_that_the_template_refuses_is_named_by_its_line(write_jsonl, tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    path = write_jsonl("a.jsonl", ours(1))
    said = f"{path} line 1: the chat template refuses a chat of the roles user: no (data.malformed=skip"
    assert refusal(path, tokenizer).startswith(said)


def test_nothing_usable_is_an_error(write_jsonl, tokenizer):
    path = write_jsonl("a.jsonl", "{", "[")
    assert "no usable prompt; 2 rows, 2 malformed" in refusal(path, tokenizer, malformed="skip")


def test_the_held_out_prompts_do_not_depend_on_the_order_of_the_file(write_jsonl, tokenizer):
    records = [ours(number) for number in range(50)]
    shuffled = random.Random(0).sample(records, 50)
    held = []
    for name, rows in (("a.jsonl", records), ("b.jsonl", shuffled)):
        prompts = load_prompts(
            Data(files=(write_jsonl(name, *rows),), held_out=10), 3, ChatTemplate(tokenizer)
        )
        assert (len(prompts.train), len(prompts.held_out)) == (40, 10)
        assert not {p.id for p in prompts.train} & {p.id for p in prompts.held_out}
        held.append({prompt.id for prompt in prompts.held_out})
    assert held[0] == held[1]
    other = load_prompts(
        Data(files=(write_jsonl("a.jsonl", *records),), held_out=10), 4, ChatTemplate(tokenizer)
    )
    assert {prompt.id for prompt in other.held_out} != held[0]


def test_holding_out_everything_is_refused(write_jsonl, tokenizer):
    path = write_jsonl("a.jsonl", ours(1), ours(2))
    with pytest.raises(DataError, match=r"data\.held_out=2 leaves nothing to train on: there are 2 prompts"):
        load_prompts(Data(files=(path,), held_out=2), 0, ChatTemplate(tokenizer))


def test_held_out_files_must_not_overlap_the_training_files(write_jsonl, tokenizer):
    train = write_jsonl("train.jsonl", ours(1), ours(2))
    held = write_jsonl("held.jsonl", ours(3))
    prompts = load_prompts(Data(files=(train,), held_out=(held,)), 0, ChatTemplate(tokenizer))
    assert str(prompts).splitlines()[0] == "2 training prompts, 1 held out"
    same_text = write_jsonl("same.jsonl", ours(9, text="sort 2"))
    with pytest.raises(DataError, match="held-out prompt 'p9' is also the training prompt 'p2': 'sort 2'"):
        load_prompts(Data(files=(train,), held_out=(same_text,)), 0, ChatTemplate(tokenizer))
    same_id = write_jsonl("id.jsonl", ours(1, text="another"))
    with pytest.raises(DataError, match="held-out prompt 'p1' is also the training prompt 'p1'"):
        load_prompts(Data(files=(train,), held_out=(same_id,)), 0, ChatTemplate(tokenizer))
