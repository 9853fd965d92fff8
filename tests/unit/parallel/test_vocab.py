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
    logits = torch.zeros(0, 5, requires_grad=True)
    values, ids = vocab.topk(logits, 2, ALONE, vocab=5)
    assert values.shape == ids.shape == (0, 2)
    vocab.log_prob(logits, torch.zeros(0, dtype=torch.int64), ALONE, vocab=5).sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 5)


def test_gradients_by_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    targets = torch.tensor([4, 0, 2])
    ids = torch.tensor([[1, 4], [0, 0], [3, 2]])
    assert torch.autograd.gradcheck(lambda x: vocab.logsumexp(x, ALONE, 5), logits)
    assert torch.autograd.gradcheck(lambda x: vocab.log_prob(x, targets, ALONE, 5), logits)
    assert torch.autograd.gradcheck(lambda x: vocab.gather_logits(x, ids, ALONE), logits)
    assert torch.autograd.gradcheck(
        lambda x: vocab.entropy(x, torch.logsumexp(x[:, :5], 1), ALONE, 5), logits
    )


def test_forbidden_tokens_have_no_probability_and_no_gradient() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    lse = vocab.logsumexp(logits, ALONE, 3)
    entropy = vocab.entropy(logits, lse, ALONE, 3)
    p = torch.softmax(torch.tensor([0.0, 1.0], dtype=torch.float64), 0)
    assert_close(entropy, -(p * p.log()).sum()[None])
    (lse + entropy).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert logits.grad.isfinite().all()


def test_gather_leaves_unused_slots_at_minus_infinity_and_without_gradient() -> None:
    logits = torch.tensor([[5.0, 6.0]], requires_grad=True)
    got = vocab.gather_logits(logits, torch.tensor([[1, NO_ID, 1]]), ALONE)
    assert got.tolist() == [[6.0, -torch.inf, 6.0]]
    (got * torch.tensor([[2.0, torch.nan, 3.0]])).nansum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.0, 5.0]]


def test_bf16_logits_are_reduced_in_fp32() -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    lse = vocab.logsumexp(logits, ALONE, 300)
    assert lse.dtype == torch.float32
    assert_close(lse, logits.detach().float().logsumexp(1))
    lse.sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_logit_breaks_the_log_prob_of_its_row_alone(value: float) -> None:
    """Wherever it stands, but in the padding."""
    logits = torch.zeros(3, 5)
    logits[1, 0], logits[2, 4] = value, value
    finite = vocab.log_prob(logits, torch.full((3,), 2), ALONE, vocab=4).isfinite()
    assert finite.tolist() == [True, False, True]
