"""Micro-batches that wait are used as they were built, one at a time, and wait in few bytes."""

import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_troll.batching.build import Form, build
from megatron_troll.batching.held import (
    WAITING_ENTRY_BYTES,
    WAITING_LOSS_TOKEN_BYTES,
    WAITING_TOKEN_BYTES,
    HeldBatches,
    at_rest,
    cut,
    joined,
    with_experts,
)
from megatron_troll.types import MicroBatch, TokenTopK, TopK
from tests.unit.batching.samples import VOCAB, random_rollouts, rollout

CPU = torch.device("cpu")
ROLLOUTS = random_rollouts(9)
FORMS = [Form(VOCAB), Form(VOCAB, packed=False, tp_size=2), Form(VOCAB, cp_size=2, cp_rank=1)]


def built(form: Form) -> list[MicroBatch]:
    ones = [1.0] * len(ROLLOUTS)
    batches = [build(ROLLOUTS, ones, ones, chosen, form) for chosen in ([0, 3, 4], [], [8], [1, 2])]
    return [replace(batch, frequency=torch.rand(len(batch.target))) for batch in batches]


def assert_same(one: object, other: object) -> None:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, TopK | MicroBatch):
        for name, value in vars(one).items():
            assert_same(value, vars(other)[name])
    else:
        assert one == other


@pytest.mark.parametrize("form", FORMS)
def test_a_micro_batch_is_used_as_it_was_built(form: Form) -> None:
    batches = built(form)
    waiting = HeldBatches.of(batches, CPU)
    assert len(waiting) == len(batches)
    for one, other in zip(batches, waiting, strict=True):
        assert_same(one, other)
    first, second = cut(waiting, [1, 3])
    for one, other in zip(batches, joined([first, second]), strict=True):
        assert_same(one, other)
    assert_same(batches[3], second[-1])


def test_an_engines_record_is_used_as_it_was_built() -> None:
    ids = np.arange(12).reshape(4, 3).astype(np.int32)
    one = rollout([1, 2], [3, 9, 5, 6], topk=TokenTopK(ids, -ids.astype(np.float32)))
    batch = build([one], [1.0], [1.0], [0], Form(VOCAB, topk=3))
    assert batch.rollout_topk is not None
    assert_same(batch, HeldBatches.of([batch], CPU)[0])


def test_only_the_micro_batch_in_use_has_its_own_types() -> None:
    waiting = HeldBatches.of(built(FORMS[0]), CPU)
    first = weakref.ref(waiting[0])
    parts = cut(waiting, [2, 2])
    assert parts[0][0] is first()
    assert parts[1][0].rollouts == (8,)
    assert first() is None


def test_experts_are_given_to_those_that_wait() -> None:
    batches = built(FORMS[0])
    experts = [{3: torch.full((2, 2), i, dtype=torch.uint8)} for i in range(4)]
    for given in (with_experts(batches, experts), with_experts(HeldBatches.of(batches, CPU), experts)):
        assert [each.experts for each in at_rest(given)] == experts
        assert_same(given[2], replace(batches[2], experts=experts[2]))


def test_the_bytes_of_a_micro_batch_that_waits_are_those_the_plan_counts() -> None:
    k = 3

    def size(tokens: int) -> int:
        entries = np.arange(k * tokens).reshape(tokens, k)
        topk = TokenTopK(entries.astype(np.int32), -entries.astype(np.float32))
        one = rollout([1], list(range(2, 2 + tokens)), mask=[1, 0] * (tokens // 2), topk=topk)
        batch = build([one], [1.0], [1.0], [0], Form(VOCAB, topk=k))
        (held,) = at_rest(HeldBatches.of([batch], CPU))
        record = held.rollout_topk
        assert record is not None
        own = [value for value in vars(held).values() if isinstance(value, Tensor)]
        spare = (held.cu_seqlens, held.response_advantage)
        own = [tensor for tensor in own if all(tensor is not each for each in spare)]
        return sum(tensor.nbytes for tensor in (*own, record.ids, record.logits))

    grown = size(8) - size(4)
    expected = 4 * WAITING_TOKEN_BYTES + 2 * WAITING_LOSS_TOKEN_BYTES + 2 * (k + 1) * WAITING_ENTRY_BYTES
    assert grown == expected
    assert WAITING_ENTRY_BYTES == 8
