"""Vocabulary operations on one rank, against plain torch; tests/dist/test_vocab_parallel.py has shards."""

import pytest
import torch
from torch.testing import assert_close

from megatron_troll.parallel import vocab
from megatron_troll.parallel.groups import ALONE
from megatron_troll.types import NO_ID


def test_no_rows() -> None:
    logits = torch.zeros(0, 5)
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
