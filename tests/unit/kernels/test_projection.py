import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from troll_kernels.project import Projection, project
from troll_kernels.sparsify import sparse_logp

from tests.unit.kernels.pairs import P_D, VOCAB, counts, logits, supports


def projected(
    new_ids: Tensor,
    new: Tensor,
    old_ids: Tensor,
    old: Tensor,
    bound: float,
    vocab: int = VOCAB,
    p_d: float = P_D,
) -> Projection:
    """Projection of new onto old, both given by their logits on full slots."""
    size = counts(*new.shape)
    new_logp = sparse_logp(new, size, vocab, p_d)
    old_logp = sparse_logp(old, counts(*old.shape), vocab, p_d)
    return project(new_ids, new_logp, old_ids, old_logp, torch.full_like(new[:, 0], bound), vocab, p_d)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bound", [0.01, 0.3, 100.0])
def test_gradient_against_finite_differences(shared, bound):
    generator = torch.Generator().manual_seed(3)
    old_ids, new_ids = supports(4, 5, shared, generator)
    old, new = logits(4, 5, 1.0, generator), logits(4, 5, 1.0, generator).requires_grad_()

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        p = projected(new_ids, x, old_ids, old, bound, vocab=40, p_d=1e-3)
        return p.new, p.old, p.default

    assert torch.autograd.gradcheck(outputs, (new,), atol=1e-7)


@pytest.mark.parametrize("shared", [True, False])
def test_regression_is_the_kl_to_a_constant_projection(shared):
    generator = torch.Generator().manual_seed(5)
    old_ids, new_ids = supports(6, 4, shared, generator)
    old, new = logits(6, 4, 1.0, generator), logits(6, 4, 1.0, generator).requires_grad_()
    vocab, p_d = 30, 1e-3
    result = projected(new_ids, new, old_ids, old, 0.05, vocab, p_d)
    pi = result.default.detach()[:, None].exp().expand(6, vocab).clone()
    pi = pi.scatter(1, old_ids, result.old.detach().exp()).scatter(1, new_ids, result.new.detach().exp())
    p = torch.full((6, vocab), p_d, dtype=new.dtype).scatter(
        1, new_ids, sparse_logp(new, counts(6, 4), vocab, p_d).exp()
    )
    expected = (p * (p.log() - pi.log())).sum(1)
    assert torch.allclose(result.kl_new_pi, expected, rtol=1e-9, atol=1e-12)
    assert torch.allclose(pi.sum(1), torch.ones(6, dtype=pi.dtype), rtol=1e-9, atol=1e-12)
    (mine,) = torch.autograd.grad(result.kl_new_pi.sum(), new)
    (theirs,) = torch.autograd.grad(expected.sum(), new)
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def families(generator: torch.Generator) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """new_ids, new, old_ids, old: kinds of pairs that make solvers fail, 500 of each."""
    pairs = []
    for spread, change, shared in [
        (4.0, 0.3, True), (4.0, 1.5, True), (1.0, 1.0, True), (8.0, 4.0, True),
        (4.0, 0.5, False), (8.0, 2.0, False), (0.3, 0.1, False), (4.0, 0.12, True),
    ]:  # fmt: skip
        old_ids, new_ids = supports(500, 64, shared, generator)
        old = logits(500, 64, spread, generator)
        new = old + change * torch.randn(500, 64, generator=generator, dtype=torch.float64)
        pairs.append((new_ids, new, old_ids, old))
    one = torch.zeros(500, 1, dtype=torch.float64)
    ids = torch.arange(500)[:, None] % 64
    pairs.append((ids, one, ids + 64, one))
    return pairs


def reference_tau(logp_new: Tensor, logp_old: Tensor, multiplicity: Tensor, bound: float) -> Tensor:
    """Bisection of KL(pi_tau || old) - bound in float64 on dense slots [N, U], by the plain formula."""
    q, a = logp_old, logp_new - logp_old
    lo, hi = torch.zeros(len(q), dtype=q.dtype), torch.ones(len(q), dtype=q.dtype)
    for _ in range(80):
        tau = (lo + hi) / 2
        y = q + tau[:, None] * a
        y = y - torch.logsumexp(y + multiplicity.log(), 1, keepdim=True)
        over = (multiplicity * y.exp() * (y - q)).sum(1) > bound
        lo, hi = torch.where(over, lo, tau), torch.where(over, tau, hi)
    return (lo + hi) / 2


def dense_slots(ids: Tensor, logp: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """[N, tokens + 1] log-probs by token id, the tokens from `tokens` on as one slot of that multiplicity."""
    rows = torch.full((len(ids), tokens + 1), P_D, dtype=torch.float64).log()
    multiplicity = torch.ones(len(ids), tokens + 1, dtype=torch.float64)
    multiplicity[:, -1] = VOCAB - tokens
    return rows.scatter(1, ids, logp.double()), multiplicity


def test_float32_tau_against_float64_bisection():
    bound, errors, passes = 0.05, [], []
    for new_ids, new, old_ids, old in families(torch.Generator().manual_seed(0)):
        new_logp = sparse_logp(new.float(), counts(*new.shape), VOCAB, P_D)
        old_logp = sparse_logp(old.float(), counts(*old.shape), VOCAB, P_D)
        result = project(new_ids, new_logp, old_ids, old_logp, torch.full((500,), bound), VOCAB, P_D)
        dense_new, multiplicity = dense_slots(new_ids, new_logp, 128)
        dense_old, _ = dense_slots(old_ids, old_logp, 128)
        tau = reference_tau(dense_new, dense_old, multiplicity, bound)
        errors.append((result.tau.double() / tau - 1).abs()[result.active])
        passes.append(result.passes[result.active].double())
        assert result.solved.all()
        assert (result.kl_after <= bound * (1 + 1e-4)).all()
    errors, passes = torch.cat(errors), torch.cat(passes)
    assert len(errors) > 3000
    assert errors.quantile(0.99) <= 1e-5
    assert passes.mean() < 8


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 8),
    spread=st.floats(0.01, 12.0),
    shared=st.booleans(),
    bound=st.floats(1e-6, 2.0),
)
def test_projection_stays_in_the_ball_and_moves_no_mass_by_gradient(seed, width, spread, shared, bound):
    generator = torch.Generator().manual_seed(seed)
    old_ids, new_ids = supports(3, width, shared, generator)
    old, new = logits(3, width, spread, generator), logits(3, width, spread, generator).requires_grad_()
    result = projected(new_ids, new, old_ids, old, bound)
    assert (result.kl_after <= bound * (1 + 1e-4)).all()
    assert result.solved.all()
    assert torch.equal(result.active, result.kl_before > bound)
    (result.new * torch.randn(new.shape, generator=generator)).sum().backward()
    assert new.grad is not None
    assert new.grad.sum(1).abs().max() < 1e-9 * (1 + new.grad.abs().max())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 6), shared=st.booleans())
def test_a_huge_bound_changes_nothing(seed, width, shared):
    generator = torch.Generator().manual_seed(seed)
    old_ids, new_ids = supports(2, width, shared, generator)
    old, new = logits(2, width, 3.0, generator), logits(2, width, 3.0, generator)
    result = projected(new_ids, new, old_ids, old, 1e9)
    assert torch.equal(result.new, sparse_logp(new, counts(2, width), VOCAB, P_D))
    assert (result.tau == 1).all()
    assert (result.kl_new_pi == 0).all()


def test_shared_ids_equal_matched_ids():
    generator = torch.Generator().manual_seed(1)
    ids, _ = supports(7, 6, True, generator)
    old, new = logits(7, 6, 2.0, generator), logits(7, 6, 2.0, generator)
    shuffled = torch.randperm(6, generator=generator)
    aligned = projected(ids, new, ids, old, 0.05)
    matched = projected(ids[:, shuffled], new[:, shuffled], ids, old, 0.05)
    assert torch.allclose(aligned.old, matched.old, rtol=1e-9, atol=1e-10)
    assert torch.allclose(aligned.new[:, shuffled], matched.new, rtol=1e-9, atol=1e-10)
    assert torch.equal(aligned.outside, matched.outside)


def test_bound_of_zero_is_the_old_policy_without_gradient():
    generator = torch.Generator().manual_seed(2)
    ids, _ = supports(3, 4, True, generator)
    old, new = logits(3, 4, 1.0, generator), logits(3, 4, 1.0, generator).requires_grad_()
    result = projected(ids, new, ids, old, 0.0)
    assert torch.allclose(result.new, sparse_logp(old, counts(3, 4), VOCAB, P_D), rtol=1e-9, atol=1e-12)
    assert (result.tau == 0).all()
    result.new.sum().backward()
    assert new.grad is not None
    assert (new.grad == 0).all()


def test_two_categories_have_no_policy_gradient():
    """All that is left of a binary choice on the boundary is the boundary (ALGORITHMS 1.5)."""
    old = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    new = torch.tensor([[3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 1]])
    result = projected(ids, new, ids, old, 0.05, vocab=2)
    assert result.active.all()
    result.new[0, 0].backward()
    assert new.grad is not None
    assert new.grad.abs().max() < 1e-12


def test_no_positions():
    empty = torch.zeros(0, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.zeros(0, 3, dtype=torch.int64)
    result = projected(ids, empty, ids, empty.detach(), 0.05)
    assert result.new.shape == (0, 3)
    result.new.sum().backward()


def test_chunked_matching_sees_every_row():
    generator = torch.Generator().manual_seed(4)
    old_ids, new_ids = supports(2500, 3, False, generator)
    old, new = logits(2500, 3, 1.0, generator), logits(2500, 3, 1.0, generator)
    whole = projected(new_ids, new, old_ids, old, 0.05)
    tail = projected(new_ids[2400:], new[2400:], old_ids[2400:], old[2400:], 0.05)
    assert torch.equal(whole.tau[2400:], tail.tau)


@pytest.mark.parametrize("bound", [-0.1, float("nan")])
def test_bounds_that_are_none_are_refused(bound):
    zero = torch.zeros(1, 1, dtype=torch.float64)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="bounds must be >= 0"):
        projected(ids, zero, ids, zero, bound)
