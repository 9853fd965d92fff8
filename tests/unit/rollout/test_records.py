"""Answers and records come out of flat arrays as they went in, and the arrays hold nothing else."""

from dataclasses import replace

import pytest

from megatron_troll.parallel.groups import Arrays
from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.records import packed, packed_records, unpacked, unpacked_records
from tests.unit.rollout.answers import K, answer, assert_arrays

ANSWERS = [answer(length) for length in (5, 1, 0, 7)]


def size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("answers", [ANSWERS, [], ANSWERS[2:3]])
def test_answers_come_back_to_the_bit(answers: list[Completion]) -> None:
    arrays = packed(answers)
    assert size(arrays) == 12 * sum(len(one.ids) for one in answers) + 9 * len(answers)
    for one, other in zip(answers, unpacked(arrays), strict=True):
        assert (other.topk, other.experts, other.finish) == (None, None, one.finish)
        for name in ("ids", "logp", "versions"):
            assert_arrays(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("lacking", [(), (1,), (0, 3), (0, 1, 2, 3)])
def test_records_come_back_to_the_bit(lacking: tuple[int, ...]) -> None:
    """Those that are None, too."""
    records = [(one.topk, one.experts) for one in ANSWERS]
    for i in lacking:
        records[i] = (None, None)
    arrays = packed_records(records)
    entries = K * sum(len(topk.ids) for topk, _ in records if topk is not None)
    experts = sum(each.nbytes for _, each in records if each is not None)
    assert size(arrays) == 8 * entries + experts + 16 * len(records)
    for (topk, experts), (topk_there, experts_there) in zip(records, unpacked_records(arrays), strict=True):
        assert (topk is None, experts is None) == (topk_there is None, experts_there is None)
        if topk is not None and topk_there is not None:
            assert_arrays(topk.ids, topk_there.ids)
            assert_arrays(topk.logp, topk_there.logp)
        if experts is not None and experts_there is not None:
            assert_arrays(experts, experts_there)


def test_a_top_k_without_experts_comes_back_so() -> None:
    (record,) = unpacked_records(packed_records([(ANSWERS[0].topk, None)]))
    assert record[0] is not None
    assert record[1] is None


def test_records_of_another_size_are_refused() -> None:
    wider = replace(ANSWERS[0], topk=answer(5, k=K + 1).topk)
    with pytest.raises(ValueError, match="dimension"):
        packed_records([(one.topk, None) for one in (*ANSWERS, wider)])
