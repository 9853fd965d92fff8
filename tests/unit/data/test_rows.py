"""Records of JSON and Parquet that cannot be used: each is named by file and line or row."""

import datetime
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_troll.config import Data, WarmStart
from megatron_troll.data.demonstrations import load_demonstrations
from megatron_troll.data.reader import Reader
from megatron_troll.data.rows import DataError, read_rows
from megatron_troll.data.template import ChatTemplate

GOOD = '{"messages": [{"role": "user", "content": "sort 31"}], "answer": "13"}'
SURROGATE = "text with half a character, U+D83D, after "
BAD = [
    (GOOD.replace("31", "\\ud83d"), SURROGATE + "'sort '"),
    (GOOD.replace('"13"', '"\\ud83d"'), SURROGATE),
    (GOOD[:-1] + ', "id": "\\ud83d"}', SURROGATE),
    (GOOD[:-1] + ', "\\ud83d": 1}', SURROGATE),
    (GOOD[:-1] + ', "tests": [{"in": ["\\ud83d"]}]}', SURROGATE),
    (GOOD[:-1] + ', "n": ' + "1" * 5000 + "}", "a number that cannot be read: "),
    (GOOD[:-1] + ', "n": ' + "[" * 3000 + "]" * 3000 + "}", "lists and objects in more than 100 levels"),
    (GOOD[:-1] + ', "n": ' + "[" * 200 + "]" * 200 + "}", "lists and objects in more than 100 levels"),
    (GOOD[:-1] + ', "answer": "31"}', "the key 'answer' is given twice in one object"),
    (GOOD.replace('"role"', '"role": "system", "role"'), "the key 'role' is given twice in one object"),
    (GOOD.replace("31", "\u00e9"), "the tokenizer has no token for '\u00e9' (U+00E9)"),
    (GOOD.replace("user", "User"), "the tokenizer has no token for '<'"),
    ("\\x00", "not valid JSON"),
]


def two_lines(tmp_path, bad: str) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text(f"{bad}\n{GOOD.replace('31', '32')}\n")
    return str(path)


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_a_line_that_cannot_be_used_is_named_or_skipped(tmp_path, tokenizer, bad, said):
    path = two_lines(tmp_path, bad)
    config = Data(files=(path,))
    with pytest.raises(DataError) as caught:
        Reader(config, "data", ChatTemplate(tokenizer)).files((path,), config)
    assert str(caught.value).startswith(f"{path} line 1: ")
    assert said in str(caught.value)
    skipping = config.model_copy(update={"malformed": "skip"})
    reader = Reader(skipping, "data", ChatTemplate(tokenizer))
    prompts = reader.files((path,), config)
    assert ([prompt.messages[0].content for prompt in prompts], reader.counts.malformed) == (["sort 32"], 1)
    assert f"first: {path} line 1: " in str(reader.counts)


ANSWERED = ', {"role": "assistant", "content": "13"}], "answer"'


@pytest.mark.parametrize(("bad", "said"), BAD)
def test_so_is_a_demonstration(tmp_path, tokenizer, bad, said):
    path = two_lines(tmp_path, bad)
    Path(path).write_text(Path(path).read_text().replace('], "answer"', ANSWERED))
    config = WarmStart(files=(path,))
    with pytest.raises(DataError) as caught:
        load_demonstrations(config, ChatTemplate(tokenizer), 256)
    assert str(caught.value).startswith(f"{path} line 1: ")
    assert said in str(caught.value)
    found = load_demonstrations(config.model_copy(update={"malformed": "skip"}), ChatTemplate(tokenizer), 256)
    assert (len(found.examples), found.malformed) == (1, 1)
    assert str(found).startswith(f"1 demonstrations, 1 malformed skipped (first: {path} line 1: ")


def test_nesting_that_json_needs_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD[:-1] + ', "n": ' + "[" * 90 + "]" * 90 + "}\n")
    (row,) = read_rows(path)
    assert row.problem is None


def parquet(tmp_path, table: pa.Table, **options) -> str:
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path, **options)
    return path


def test_a_value_beyond_python_makes_its_own_row_malformed(tmp_path):
    beyond = pa.array([0, 10**14, 1], pa.timestamp("s"))
    rows = list(read_rows(parquet(tmp_path, pa.table({"question": ["a", "b", "c"], "at": beyond}))))
    assert [row.problem is None for row in rows] == [True, False, True]
    assert rows[1].where.endswith("a.parquet row 2")
    assert rows[2].value == {"question": "c", "at": datetime.datetime(1970, 1, 1, 0, 0, 1)}


def test_text_that_is_not_utf8_makes_its_own_row_malformed(tmp_path):
    text = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.string())
    rows = list(read_rows(parquet(tmp_path, pa.table({"question": text}))))
    assert [row.problem is None for row in rows] == [True, False, True]


def refusal(path: str) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    return str(caught.value)


def test_two_columns_of_one_name_are_refused(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"])]
    path = parquet(tmp_path, pa.Table.from_arrays(columns, names=["answer", "answer"]))
    assert refusal(path) == f"{path}: 2 columns have the name 'answer'"
    fields = [pa.field("role", pa.string()), pa.field("role", pa.string())]
    turns = pa.array([[{}]], pa.list_(pa.struct(fields)))
    path = parquet(tmp_path, pa.table({"messages": turns}))
    assert refusal(path) == f"{path}: 2 columns have the name 'role'"


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_damaged_page_names_its_file(tmp_path, compression, checksum):
    """Uncompressed pages without checksums are damaged unnoticed unless their structure breaks."""
    table = pa.table(
        {"question": [f"sort {n}" for n in range(5000)], "answer": [str(n) for n in range(5000)]}
    )
    options = {"compression": compression, "write_page_checksum": checksum, "use_dictionary": False}
    path = parquet(tmp_path, table, **options)
    data = bytearray(Path(path).read_bytes())
    data[40:4000:7] = b"\xff" * len(data[40:4000:7])
    Path(path).write_bytes(data)
    assert refusal(path).startswith(f"{path}: cannot be read as Parquet after row 0: ")


def test_every_cut_of_a_file_is_refused_by_name(tmp_path):
    path = parquet(tmp_path, pa.table({"question": [f"sort {n}" for n in range(100)]}))
    whole = Path(path).read_bytes()
    for length in range(0, len(whole), 37):
        Path(path).write_bytes(whole[:length])
        assert refusal(path).startswith(f"{path}: ")


def test_a_record_of_five_megabytes_is_a_record(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": "a" * 5_000_000, "answer": "#### 1"}) + "\n")
    (row,) = read_rows(path)
    assert len(row.value["question"]) == 5_000_000


def test_half_a_character_as_bytes_is_malformed_too(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"answer": "a"}\n{"answer": "a\xed\xa0\x80b"}\n')
    first, second = read_rows(file)
    assert first.value == {"answer": "a"}
    assert second.problem == "not valid UTF-8: invalid continuation byte at byte 14"
