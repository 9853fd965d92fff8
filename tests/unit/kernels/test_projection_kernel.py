"""The Triton projection against the reference, which test_projection.py tests by itself."""

import pytest
import torch
from torch import Tensor
from troll_kernels.project import Projection
from troll_kernels.project.solve import MAX_PASSES
from troll_kernels.sparsify import NO_ID, sparse_logp

from tests.unit.kernels.implementations import kernel, reference
from tests.unit.kernels.pairs import P_D, VOCAB, logits, supports
from tools.check_projection import KINDS, MAX_ERROR, MAX_EXCESS, draw, measure

# numpy under the interpreter remarks on the infinities that `where` then drops.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = float("inf")
ROWS = 4


def run(
    operation, ids: tuple[Tensor, Tensor], new: Tensor, old: Tensor, counts: tuple[Tensor, Tensor],
    bound: float, vocab: int, p_d: float,
) -> tuple[Projection, Tensor]:  # fmt: skip
    """The projection, and the gradient of random factors on its four differentiable outputs."""
    new = new.clone().requires_grad_()
    new_logp = sparse_logp(new, counts[0], vocab, p_d)
    old_logp = sparse_logp(old, counts[1], vocab, p_d)
    result = operation.project(ids[0], new_logp, ids[1], old_logp, torch.full((ROWS,), bound), vocab, p_d)
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(part.shape, generator=generator) for part in result[:4]]
    total = sum((part.where(part > -INF, 0.0) * factor).sum() for part, factor in zip(result, factors))
    (grad,) = torch.autograd.grad(total, new)
    return result, grad


@pytest.mark.parametrize(
    ("width", "shared", "spread", "bound", "vocab", "p_d"),
    [
        (5, True, 2.0, 0.05, VOCAB, P_D),
        (5, False, 2.0, 0.05, VOCAB, P_D),
        (65, True, 4.0, 0.001, VOCAB, P_D),
        (65, False, 4.0, 0.05, VOCAB, P_D),
        (20, False, 8.0, 0.25, 60, 1e-3),
        (4, True, 1.0, 0.01, 8, 1e-3),
        (6, False, 1.0, 0.0, VOCAB, P_D),
        (6, True, 0.1, 5.0, VOCAB, P_D),
        (257, False, 2.0, 0.05, VOCAB, P_D),
    ],
)
def test_kernel_is_the_reference(width, shared, spread, bound, vocab, p_d):
    generator = torch.Generator().manual_seed(0)
    old_ids, new_ids = supports(ROWS, width, shared, generator)
    old = logits(ROWS, width, spread, generator).float()
    new = old + torch.randn(ROWS, width, generator=generator)
    old_count = torch.randint(2, width + 1, (ROWS,), generator=generator)
    new_count = old_count if shared else torch.randint(2, width + 1, (ROWS,), generator=generator)
    new[2, 0] = -INF  # a kept token that the new policy rules out
    old_ids = old_ids.where(torch.arange(width) < old_count[:, None], NO_ID)
    new_ids = old_ids if shared else new_ids.where(torch.arange(width) < new_count[:, None], NO_ID)
    arguments = (new_ids, old_ids), new, old, (new_count, old_count), bound, vocab, p_d
    (mine, my_grad), (theirs, their_grad) = (run(by("project"), *arguments) for by in (kernel, reference))
    for name, got, expected in zip(Projection._fields, mine, theirs):
        assert got.dtype == expected.dtype, name
        if name != "passes":  # at small bounds rounding decides when the solver is content
            torch.testing.assert_close(
                got, expected, rtol=2e-5, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert mine.passes.max() <= MAX_PASSES
    torch.testing.assert_close(my_grad, their_grad, rtol=1e-4, atol=1e-4)


def test_inside_the_ball_nothing_changes_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    ids, _ = supports(ROWS, 7, True, generator)
    logp = sparse_logp(logits(ROWS, 7, 2.0, generator).float(), torch.full((ROWS,), 7), VOCAB, P_D)
    result = kernel("project").project(ids, logp, ids, logp - 1e-4, torch.full((ROWS,), 1.0), VOCAB, P_D)
    assert torch.equal(result.new, logp)
    assert (result.kl_new_pi == 0.0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("by", "rows"), [(reference, 400), (kernel, 10)], ids=["reference", "kernel"])
def test_accuracy_on_pairs_that_make_solvers_fail(kind, by, rows):
    """tools/check_projection.py does this for 100,000."""
    pairs = draw(KINDS[kind], rows, torch.Generator().manual_seed(0))
    accuracy = measure(pairs, by("project").project(*pairs, 151_936, P_D))
    assert len(accuracy.error) > rows // 10
    assert accuracy.error.quantile(0.98) <= MAX_ERROR
    assert accuracy.excess.max() <= MAX_EXCESS


def test_more_slots_than_registers_hold_are_refused():
    ids = torch.arange(513)[None]
    logp = torch.zeros(1, 513)
    with pytest.raises(ValueError, match="supports of 513 slots: the Triton kernels hold at most 512"):
        kernel("project").project(ids, logp, ids, logp, torch.ones(1), VOCAB, P_D)


def test_a_negative_bound_is_refused():
    ids, logp = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1)
    with pytest.raises(ValueError, match="bounds must be >= 0"):
        kernel("project").project(ids, logp, ids, logp, torch.tensor([-1.0]), VOCAB, P_D)


def test_no_positions():
    ids, logp = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, requires_grad=True)
    result = kernel("project").project(ids, logp, ids, logp.detach(), torch.zeros(0), VOCAB, P_D)
    result.new.sum().backward()
    assert logp.grad is not None
