import pytest
import torch
from troll_kernels.sparsify import NO_ID, in_prefix, select, sparse_logp

INF = float("inf")


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_prefix_ends_where_the_mass_is_reached():
    values = row(0.6, 0.3, 0.08, 0.02).log()
    lse = torch.zeros(1, dtype=torch.float64)
    assert in_prefix(values, lse, delta=0.2).tolist() == [[True, True, False, False]]
    assert in_prefix(values, lse, delta=0.0).all()


def test_sampled_token_follows_the_prefix_that_lacks_it():
    values, ids = row(0.6, 0.3).log(), torch.tensor([[7, 2]])
    picked = select(values, ids, torch.zeros(1), torch.tensor([5]), row(0.05).log()[0], delta=0.3)
    out_ids, logits, count, place = picked
    assert out_ids.tolist() == [[7, 2, 5]]
    assert (count.item(), place.item()) == (3, 2)
    assert torch.equal(logits.exp().round(decimals=9), row(0.6, 0.3, 0.05))


def test_sampled_token_inside_the_top_k_but_past_the_prefix_is_moved_up():
    values, ids = row(0.9, 0.06, 0.04).log(), torch.tensor([[7, 2, 5]])
    ids, logits, count, place = select(
        values, ids, torch.zeros(1), torch.tensor([5]), row(0.04).log()[0], delta=0.2
    )
    assert ids.tolist() == [[7, 5, NO_ID, NO_ID]]
    assert (count.item(), place.item()) == (2, 1)
    assert logits[0, 2:].tolist() == [-INF, -INF]


def test_impossible_token_stays_outside():
    ids, _, count, place = select(
        row(0.0, -INF), torch.tensor([[3, NO_ID]]), torch.zeros(1), torch.tensor([1]), row(-INF)[0], delta=0.0
    )
    assert ids.tolist() == [[3, NO_ID, NO_ID]]
    assert (count.item(), place.item()) == (1, NO_ID)


def test_nan_reaches_the_log_probs():
    values = row(float("nan"), 0.0)
    nan = torch.full((1,), float("nan"))
    ids, logits, count, _ = select(values, torch.tensor([[0, 1]]), nan, torch.tensor([1]), row(0.0)[0], 0.1)
    assert sparse_logp(logits, count, 10, 1e-12)[ids >= 0].isnan().any()


def test_mass_is_one_with_the_default_tokens():
    logits, count, vocab, p_d = row(2.0, 1.0, 0.5, -INF), torch.tensor([3]), 1000, 1e-4
    logp = sparse_logp(logits, count, vocab, p_d)
    assert torch.allclose(
        logp.exp().sum() + 997 * p_d, torch.ones((), dtype=torch.float64), rtol=1e-9, atol=1e-14
    )


def test_kept_id_without_a_logit_leaves_the_support():
    """`support: old`: the new policy may forbid a token that the old one keeps."""
    logp = sparse_logp(row(1.0, -INF, 0.0), torch.tensor([3]), vocab=3, p_d=0.1)
    assert logp[0, 1] == -INF
    assert torch.allclose(logp.exp().sum(), torch.tensor(0.9, dtype=torch.float64))


def test_whole_vocabulary_is_the_dense_softmax_and_p_d_is_unused():
    logits = torch.randn(5, 4, dtype=torch.float64)
    logp = sparse_logp(logits, torch.full((5,), 4), vocab=4, p_d=0.5)
    assert torch.equal(logp, logits.log_softmax(1))


def test_gradient():
    logits = torch.randn(3, 4, dtype=torch.float64)
    logits[0, 3] = -INF
    logits.requires_grad_()
    probabilities = lambda x: sparse_logp(x, torch.tensor([3, 4, 2]), 50, 1e-3).exp()  # noqa: E731
    (gradient,) = torch.autograd.grad(probabilities(logits)[:, 0].sum(), logits)
    p = logits.detach().clone()
    p[2, 2:] = -INF
    p, c = p.softmax(1), 1 - 1e-3 * torch.tensor([[47.0], [46.0], [48.0]], dtype=torch.float64)
    first = torch.eye(4, dtype=torch.float64)[0]
    assert torch.allclose(gradient, c * p[:, :1] * (first - p), rtol=1e-9, atol=1e-12)


def test_default_tokens_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="choose a smaller p_d"):
        sparse_logp(row(0.0, 1.0), torch.tensor([2]), vocab=12, p_d=0.1)
