"""Public sets are read with the lines that docs/data.md gives for them."""

import base64
import json
import pickle
import re
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_troll.config import Data, RewardConfig
from megatron_troll.config.load import assemble
from megatron_troll.data.conversion import Conversion, LeftOut
from megatron_troll.data.rows import Malformed, read_rows
from megatron_troll.rewards.reward import build, problem
from megatron_troll.types import Prompt
from tests.house.markdown import ROOT
from tests.unit.data.published import EURUS, LIVE, SETS, Row, packed, task

TABLE = (
    (ROOT / "docs" / "data.md").read_text().split("| set | file | besides `data.files` |\n|---|---|---|\n")[1]
)
LINES = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.split("\n\n")[0].splitlines()]
MODEL = "models.policy.path=/models/Qwen3-0.6B"


def written(path: Path, rows: list[Row]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def converted(path: str, data: Data) -> list[Prompt]:
    """The prompts of a file, without those that `where` leaves out."""
    convert, prompts = Conversion(data.mixture[""], "data"), []
    for row in read_rows(path):
        try:
            prompts.append(convert(row))
        except LeftOut:
            continue
    return prompts


def test_the_table_names_every_set_that_is_tested() -> None:
    assert [name for name, _, _ in LINES] == list(SETS)


@pytest.mark.parametrize(("name", "file", "lines"), LINES)
def test_a_set_is_read_with_its_lines(name: str, file: str, lines: str, tmp_path: Path) -> None:
    of = SETS[name]
    path = written(tmp_path / file.strip("`"), of.rows)
    given = re.findall(r"`([^`]+)`", lines)
    config = assemble([], ["name=a", MODEL, f"data.files=['{path}']", "reward={name: math_verify}", *given])
    assert config.data is not None
    prompts = converted(path, config.data)
    assert (prompts[0].messages[-1].content, prompts[0].answer) == (of.asked, of.answer)
    assert len({prompt.id for prompt in prompts}) == of.kept
    verifier = build(config.reward)
    assert [problem(verifier, prompt) for prompt in prompts] == [None] * of.kept


def test_eurus_without_its_filter_is_refused_with_the_line_that_filters(tmp_path: Path) -> None:
    path = written(tmp_path / "train.parquet", EURUS)
    with pytest.raises(Malformed) as caught:
        converted(path, Data(files=(path,)))
    assert "the ability is 'code', of earlier rows 'math'" in str(caught.value)
    assert "data.where={ability: math} takes only those" in str(caught.value)


def test_tests_of_livecodebench_are_what_the_code_reward_runs(tmp_path: Path) -> None:
    path = written(tmp_path / "test6.jsonl", LIVE)
    double, pairs = converted(path, Data(files=(path,)))
    assert double.record["tests"] == [{"input": "2\n", "output": "4\n"}, {"input": "5\n", "output": "10"}]
    assert "def pairs(self, of: List[int], step: int)" in pairs.messages[0].content
    judge = build(RewardConfig(name="code"))
    whole = "class Solution:\n    def pairs(self, of, step):\n        return tuple(n + step for n in of)"
    for prompt, program, reward in (
        (double, "print(2 * int(input()))", 1.0),
        (double, "print(4)", 0.0),
        (pairs, whole, 1.0),
        (pairs, whole.replace("n + step", "n + 3 * step"), 0.0),
    ):
        assert judge(f"```python\n{program}\n```", prompt) == reward


class Opens:
    """Its pickle would open a file."""

    def __reduce__(self) -> Any:
        return open, ("/tmp/opened", "w")


def test_packed_tests_are_read_without_running_their_pickle(tmp_path: Path) -> None:
    hostile, boxed = (
        base64.b64encode(zlib.compress(pickle.dumps(one))).decode() for one in (Opens(), ["[]"])
    )
    bad = [
        (hostile, "is a pickle of more than a text"),
        (boxed, "is a pickle of more than a text"),
        (packed([])[:-8], "'private_test_cases' is"),
        ("!", "is neither JSON nor packed JSON"),
        (packed([{"input": "1"}]), "a test must have the texts 'input' and 'output'"),
        (packed([{"input": "NaN", "output": "1", "testtype": "functional"}]), "NaN is no number"),
        (packed([{"input": "1", "output": "1", "testtype": "other"}]), "the testtype 'other'"),
    ]
    for private, said in bad:
        row = task("f", "", [], [], "f") | {"private_test_cases": private}
        path = written(tmp_path / "a.jsonl", [row])
        with pytest.raises(Malformed, match=re.escape(said)):
            converted(path, Data(files=(path,)))
