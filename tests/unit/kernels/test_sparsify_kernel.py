"""The Triton sparsification against the reference, which test_sparsify.py tests by itself."""

import pytest
import torch
from torch import Tensor
from troll_kernels.sparsify import NO_ID

from tests.unit.kernels.implementations import kernel, reference

INF = float("inf")
ROWS, VOCAB = 7, 40


def candidates(k: int, seed: int = 0) -> tuple[Tensor, ...]:
    """values, ids, lse, target, target_logit as the head gives them, ties and tokens that are ruled out
    included; one target outside the top k, one inside, one ruled out, and k may exceed the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(ROWS, VOCAB, generator=generator)).round()
    logits[:, 5:9] = -INF
    logits[1] = 0.0
    logits[2, 1:] = -INF
    target = torch.randint(0, VOCAB, (ROWS,), generator=generator)
    target[0], target[3], target[4] = 6, logits[3].argmax(), logits[4].argmin()
    values, ids = logits.sort(dim=1, descending=True, stable=True)
    missing = max(k - VOCAB, 0)
    values = torch.nn.functional.pad(values[:, :k], (0, missing), value=-INF)
    ids = torch.nn.functional.pad(ids[:, :k], (0, missing), value=NO_ID)
    return values, ids, logits.logsumexp(1), target, logits.gather(1, target[:, None])[:, 0]


@pytest.mark.parametrize("delta", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize("k", [1, 16, 33, 50])
def test_selection_is_that_of_the_reference(k: int, delta: float) -> None:
    values, ids, lse, target, target_logit = candidates(k)
    grads = []
    for implementation in (reference("sparsify"), kernel("sparsify")):
        leaves = values.clone().requires_grad_(), target_logit.clone().requires_grad_()
        found = implementation.select(leaves[0], ids, lse, target, leaves[1], delta)
        upstream = torch.randn(found[1].shape, generator=torch.Generator().manual_seed(1))
        grads.append((found, implementation.in_prefix(values, lse, delta)))
        grads[-1] += torch.autograd.grad(found[1], leaves, upstream)
    (expected, prefix, *by_reference), (got, same, *by_kernel) = grads
    for mine, theirs in zip((*got, same, *by_kernel), (*expected, prefix, *by_reference), strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 17, 65])
def test_log_probs_and_gradients_are_those_of_the_reference(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    logits = 4 * torch.randn(ROWS, width, generator=generator)
    logits[0, 1:] = -INF
    logits[1, ::2] = -INF if width > 1 else 0.0
    count = torch.randint(1, width + 1, (ROWS,), generator=generator)
    count[1] = width
    upstream = torch.randn(ROWS, width, generator=generator)
    grads = []
    for implementation in (reference("sparsify"), kernel("sparsify")):
        leaf = logits.clone().requires_grad_()
        logp = implementation.sparse_logp(leaf, count, 1000, 1e-5)
        grads.append((logp, torch.autograd.grad(logp, leaf, upstream.masked_fill(logp == -INF, 0.0))[0]))
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_nan_reaches_the_log_probs() -> None:
    values, nan = torch.tensor([[float("nan"), 0.0]]), torch.full((1,), float("nan"))
    chosen = kernel("sparsify").select(
        values, torch.tensor([[0, 1]]), nan, torch.tensor([1]), values[:, 1], 0.1
    )
    ids, logits, count, _ = chosen
    assert kernel("sparsify").sparse_logp(logits, count, 10, 1e-12)[ids >= 0].isnan().any()


def test_no_rows() -> None:
    empty = [part[:0] for part in candidates(4)]
    ids, logits, count, place = kernel("sparsify").select(*empty, 0.1)
    assert ids.shape == logits.shape == (0, 5)
    assert count.shape == place.shape == (0,)
    assert kernel("sparsify").sparse_logp(logits, count, VOCAB, 1e-5).shape == (0, 5)


def test_default_tokens_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="choose a smaller p_d"):
        kernel("sparsify").sparse_logp(torch.zeros(1, 2), torch.tensor([2]), vocab=12, p_d=0.1)
