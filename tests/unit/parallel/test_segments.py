"""Segment sums on one rank. tests/dist/test_vocab_parallel.py does context parallelism."""

import torch

from megatron_troll.parallel.groups import ALONE
from megatron_troll.parallel.segments import segments


def test_sum_and_expand_by_response() -> None:
    by_response = segments(torch.tensor([0, 0, 2, 2, 2]), torch.tensor([0, 1, 0, 1, 2]), 3, ALONE)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    totals = by_response.sum(values)
    assert totals.tolist() == [3.0, 0.0, 12.0]
    assert by_response.expand(totals).tolist() == [3.0, 3.0, 12.0, 12.0, 12.0]
    (totals * torch.tensor([10.0, 100.0, 1000.0])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [10.0, 10.0, 1000.0, 1000.0, 1000.0]


def test_an_empty_micro_batch_stays_connected() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    by_response = segments(nothing, nothing, 0, ALONE)
    values = torch.zeros(0, requires_grad=True)
    by_response.expand(by_response.sum(values)).sum().backward()
    assert values.grad is not None
