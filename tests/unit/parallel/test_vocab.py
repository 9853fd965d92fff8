"""Vocabulary operations on one rank, against plain torch; tests/dist/test_vocab_parallel.py has shards."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from megatron_troll.parallel import vocab
from megatron_troll.parallel.groups import ALONE
from megatron_troll.types import NO_ID


def sorted_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Oracle: a full stable sort, which keeps equal values in id order."""
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


@pytest.mark.parametrize("k", [1, 7, 40, 97, 200])
@pytest.mark.parametrize("steps", [1, 2, 8, 1000])
def test_topk_breaks_ties_by_token_id(k: int, steps: int) -> None:
    logits = torch.randint(0, steps, (30, 97), generator=torch.Generator().manual_seed(k)) / 8.0
    values, ids = vocab.topk(logits, k, ALONE, vocab=97)
    expected_values, expected_ids = sorted_topk(logits, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


def test_topk_orders_signed_zeros_and_minus_infinity_by_id() -> None:
    logits = torch.tensor([[-0.0, -torch.inf, 0.0, -0.0, -torch.inf]])
    values, ids = vocab.topk(logits, 4, ALONE, vocab=5)
    assert ids.tolist() == [[0, 2, 3, 1]]
    assert values.tolist() == [[0.0, 0.0, 0.0, -torch.inf]]
    assert not values[:, :3].signbit().any()


def test_topk_ignores_padded_columns() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0]])
    values, ids = vocab.topk(logits, 4, ALONE, vocab=3)
    assert ids.tolist() == [[1, 2, 0]]
    assert values.tolist() == [[3.0, 2.0, 1.0]]


def test_no_rows() -> None:
    logits = torch.zeros(0, 5)
    values, ids = vocab.topk(logits, 2, ALONE, vocab=5)
    assert values.shape == ids.shape == (0, 2)
    assert vocab.log_softmax(logits, ALONE, vocab=5).shape == (0, 5)


def test_forbidden_tokens_and_padding_have_no_probability() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 9.0]], dtype=torch.float64)
    logp = vocab.log_softmax(logits, ALONE, 3)
    expected = torch.log_softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0)
    assert_close(logp[0, [0, 2]], expected)
    assert logp[0, [1, 3]].tolist() == [-torch.inf] * 2


def test_gather_leaves_unused_slots_at_minus_infinity() -> None:
    got = vocab.gather_logits(torch.tensor([[5.0, 6.0]]), torch.tensor([[1, NO_ID, 1]]), ALONE)
    assert got.tolist() == [[6.0, -torch.inf, 6.0]]


def test_bf16_logits_are_reduced_in_fp32() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).bfloat16()
    logp = vocab.log_softmax(logits, ALONE, 300)
    assert logp.dtype == torch.float32
    assert_close(logp, logits.float().log_softmax(1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_logit_breaks_the_log_probs_of_its_row_alone(value: float) -> None:
    """Wherever it stands, but in the padding."""
    logits = torch.zeros(3, 5)
    logits[1, 0], logits[2, 4] = value, value
    broken = vocab.log_softmax(logits, ALONE, vocab=4)[:, :4].isnan().any(1)
    assert broken.tolist() == [False, True, False]
