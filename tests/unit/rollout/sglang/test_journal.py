"""What was answered outlives the process that asked: kept exactly, and a record that a kill cut short is left
out."""

from pathlib import Path

import numpy as np
import pytest

from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.sglang.journal import Journal
from megatron_troll.types import TokenTopK


def answer(length: int, top_k: int = 3) -> Completion:
    generator = np.random.default_rng(length)
    ids = generator.integers(0, 1000, (length, top_k)).astype(np.int32)
    return Completion(
        ids=generator.integers(0, 2**17, length),
        logp=generator.normal(size=length).astype(np.float32),
        topk=TokenTopK(ids, generator.normal(size=(length, top_k)).astype(np.float32)) if top_k else None,
        versions=np.arange(length) // 3,
        finish="stop" if length % 2 else "length",
        experts=generator.integers(0, 512, (length + 3, 4, 2)).astype(np.uint16) if top_k else None,
    )


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
        journal.add(7, name, one)
    journal.add(8, "other round", answer(2))
    read = Journal(tmp_path / "buffer").read(7)
    assert read.keys() == written.keys()
    for name, one in written.items():
        assert_same(read[name], one)


def test_a_kill_costs_the_record_it_cut_and_no_other(tmp_path: Path) -> None:
    Journal(tmp_path).add(1, "first", answer(4))
    file = tmp_path / "round_000001.bin"
    first = file.stat().st_size
    Journal(tmp_path).add(1, "second", answer(5))
    whole = file.read_bytes()
    for length in range(first, len(whole)):
        file.write_bytes(whole[:length])
        journal = Journal(tmp_path)
        assert list(journal.read(1)) == ["first"]
        journal.add(1, "third", answer(3))
        assert list(journal.read(1)) == ["first", "third"]


def test_a_flipped_bit_is_not_believed(tmp_path: Path) -> None:
    Journal(tmp_path).add(1, "first", answer(4))
    file = tmp_path / "round_000001.bin"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert Journal(tmp_path).read(1) == {}


def test_rounds_are_forgotten_once_they_are_learnt_from(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for round in (1, 2, 3):
        journal.add(round, "a", answer(2))
    journal.forget(2)
    assert [list(journal.read(round)) for round in (1, 2, 3)] == [[], [], ["a"]]
    journal.add(2, "b", answer(2))
    assert list(journal.read(2)) == ["b"]


def test_bytes_of_a_record(tmp_path: Path) -> None:
    """12 a token, 8 an entry and 2 an expert, beside a line of some hundred."""
    journal, file = Journal(tmp_path), tmp_path / "round_000001.bin"
    journal.add(1, "short", answer(0, top_k=64))
    line = file.stat().st_size
    journal.add(1, "longer", answer(100, top_k=64))
    assert file.stat().st_size - 2 * line < 100 * (12 + 64 * 8 + 4 * 2 * 2) + 32
