"""What was answered outlives the process that asked: kept exactly, and a record that a kill cut short is left
out."""

from pathlib import Path

import numpy as np
import pytest

from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.sglang.journal import Journal, Stored
from megatron_troll.types import TokenTopK


def answer(length: int, top_k: int = 3) -> Completion:
    generator = np.random.default_rng(length)
    ids = generator.integers(0, 1000, (length, top_k)).astype(np.int32)
    return Completion(
        ids=generator.integers(0, 2**17, length).astype(np.int32),
        logp=generator.normal(size=length).astype(np.float32),
        topk=TokenTopK(ids, generator.normal(size=(length, top_k)).astype(np.float32)) if top_k else None,
        versions=np.arange(length, dtype=np.int32) // 3,
        finish="stop" if length % 2 else "length",
        experts=generator.integers(0, 512, (length + 3, 4, 2)).astype(np.uint16) if top_k else None,
    )


def stored(length: int, top_k: int = 3) -> Stored:
    return Stored("a hash", answer(length, top_k))


def assert_same(one: Completion, other: Completion) -> None:
    for name in ("ids", "logp", "versions"):
        here, there = getattr(one, name), getattr(other, name)
        assert here.dtype == there.dtype
        np.testing.assert_array_equal(here, there)
    assert one.finish == other.finish
    np.testing.assert_array_equal(one.experts, other.experts)
    assert (one.topk is None) == (other.topk is None)
    if one.topk is not None and other.topk is not None:
        np.testing.assert_array_equal(one.topk.ids, other.topk.ids)
        np.testing.assert_array_equal(one.topk.logp, other.topk.logp)


@pytest.mark.parametrize("top_k", [0, 3])
def test_answers_are_read_back_as_they_were(tmp_path: Path, top_k: int) -> None:
    written = {f"prompt {i}\n#0": answer(i, top_k) for i in range(6)}
    journal = Journal(tmp_path / "buffer")
    for name, one in written.items():
        journal.add(7, name, Stored(f"hash of {name}", one))
    journal.add(8, "other round", stored(2))
    read = Journal(tmp_path / "buffer").read(7)
    assert read.keys() == written.keys()
    for name, one in written.items():
        assert read[name].asked == f"hash of {name}"
        assert_same(read[name].answer, one)


def test_a_kill_costs_the_record_it_cut_and_no_other(tmp_path: Path) -> None:
    Journal(tmp_path).add(1, "first", stored(4))
    file = tmp_path / "round_000001.bin"
    first = file.stat().st_size
    Journal(tmp_path).add(1, "second", stored(5))
    whole = file.read_bytes()
    for length in range(first, len(whole)):
        file.write_bytes(whole[:length])
        journal = Journal(tmp_path)
        assert list(journal.read(1)) == ["first"]
        journal.add(1, "third", stored(3))
        assert list(journal.read(1)) == ["first", "third"]


def test_a_flipped_bit_anywhere_costs_its_record(tmp_path: Path) -> None:
    """In the line, whose shapes say how the arrays are read, as in the arrays."""
    journal, file = Journal(tmp_path), tmp_path / "round_000001.bin"
    journal.add(1, "first", stored(4))
    first = file.stat().st_size
    journal.add(1, "second", stored(1, top_k=0))
    whole = file.read_bytes()
    for at in range(first, len(whole)):
        data = bytearray(whole)
        data[at] ^= 1
        file.write_bytes(data)
        assert list(journal.read(1)) == ["first"]
        assert file.stat().st_size == first


@pytest.mark.parametrize(
    "line",
    [
        "12\n",
        "null\n",
        "[" * 10**5 + "\n",
        "\n",
        '{"name": "a", "finish": "stop", "shapes": {"ids": [0]}, "crc": 0}\n',
    ],
    ids=["a number", "null", "nested", "empty", "of a version without hashes"],
)
def test_what_is_no_record_is_said_and_overwritten(
    tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "round_000001.bin"
    file.write_text(line)
    journal = Journal(tmp_path)
    assert journal.read(1) == journal.read(1) == {}
    (said,) = caplog.messages
    assert said.startswith(f"{file}: the {len(line)} bytes from byte 0 on")
    journal.add(1, "a", stored(3))
    assert list(journal.read(1)) == ["a"]


def test_files_of_others_stay_in_the_folder(tmp_path: Path) -> None:
    names = {"round_1 (copy).bin", "round_.bin", "round_000001.bin.bak", "notes"}
    for name in names:
        (tmp_path / name).write_text("mine")
    (tmp_path / "round_000002.bin").mkdir()
    journal = Journal(tmp_path)
    journal.add(1, "a", stored(3))
    journal.forget(3)
    assert {path.name for path in tmp_path.iterdir()} == {*names, "round_000002.bin"}


def test_rounds_are_forgotten_once_they_are_learnt_from(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for round in (1, 2, 3):
        journal.add(round, "a", stored(2))
    journal.forget(2)
    assert [list(journal.read(round)) for round in (1, 2, 3)] == [[], [], ["a"]]
    journal.add(2, "b", stored(2))
    assert list(journal.read(2)) == ["b"]


def test_bytes_of_a_record(tmp_path: Path) -> None:
    """12 a token, 8 an entry and 2 an expert, beside a line of some hundred."""
    journal, file = Journal(tmp_path), tmp_path / "round_000001.bin"
    journal.add(1, "short", stored(0, top_k=64))
    line = file.stat().st_size
    journal.add(1, "longer", stored(100, top_k=64))
    assert file.stat().st_size - 2 * line < 100 * (12 + 64 * 8 + 4 * 2 * 2) + 32
