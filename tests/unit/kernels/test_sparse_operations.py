"""Three faces of one sparse matrix G [N, V]: the logits at its entries, G W and G^T h."""

import pytest
import torch
from torch import Tensor

from tests.unit.kernels.implementations import both

SHAPES = [(5, 300, 70, 17), (40, 50, 64, 33), (130, 7, 33, 9), (3, 9, 5, 2), (2, 8, 1030, 1)]
DTYPES = [torch.float32, torch.bfloat16]


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], columns [N, W] with unused slots and an unused row, grad [N, W]. With V =
    7 every column occurs in more entries than one program takes."""
    n, vocab, size, slots = shape
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(n, size, generator=generator).to(dtype)
    weight = torch.randn(vocab, size, generator=generator).to(dtype)
    columns = torch.randint(-vocab // 3, vocab, (n, slots), generator=generator).clamp(min=-1)
    columns[1] = -1
    return hidden, weight, columns, torch.randn(n, slots, generator=generator)


def dense(columns: Tensor, grad: Tensor, vocab: int) -> Tensor:
    """G in float64."""
    used = columns >= 0
    zeros = torch.zeros(len(columns), vocab, dtype=torch.float64)
    return zeros.scatter_add(1, columns.clamp(min=0), (grad * used).double())


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-5)


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_at(implementation, shape, dtype):
    hidden, weight, columns, _ = problem(shape, dtype)
    got = implementation("logits_at").logits_at(hidden, weight, columns)
    expected = (hidden.double() @ weight.double().T).gather(1, columns.clamp(min=0))
    close(got, expected.masked_fill(columns < 0, -torch.inf))


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_grad(implementation, shape, dtype):
    _, weight, columns, grad = problem(shape, dtype)
    got = implementation("hidden_grad").hidden_grad(grad, columns, weight)
    close(got, dense(columns, grad, len(weight)) @ weight.double())


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_grad_is_added(implementation, shape, dtype):
    hidden, weight, columns, grad = problem(shape, dtype)
    before = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    main_grad = before.clone()
    implementation("weight_grad").add_weight_grad(main_grad, grad, columns, hidden)
    expected = dense(columns, grad, len(weight)).T @ hidden.double()
    close(main_grad - before, expected)
    untouched = ~torch.isin(torch.arange(len(weight)), columns)
    assert torch.equal(main_grad[untouched], before[untouched])


@both
def test_rows_that_are_all_one_column(implementation):
    """The run of one column crosses every block of entries."""
    columns, grad = torch.full((300, 3), 2), torch.ones(300, 3)
    main_grad = torch.zeros(4, 5)
    implementation("weight_grad").add_weight_grad(main_grad, grad, columns, torch.ones(300, 5))
    assert main_grad.tolist() == [[0.0] * 5, [0.0] * 5, [900.0] * 5, [0.0] * 5]


@both
def test_a_part_of_a_larger_buffer(implementation):
    """A shard's gradient is a view; its neighbours stay."""
    hidden, weight, columns, grad = problem(SHAPES[0], torch.float32)
    buffer = torch.zeros(len(weight) + 2, weight.shape[1] + 6)
    implementation("weight_grad").add_weight_grad(buffer[1:-1, 2:-4], grad, columns, hidden)
    close(buffer[1:-1, 2:-4], dense(columns, grad, len(weight)).T @ hidden.double())
    buffer[1:-1, 2:-4] = 0.0
    assert (buffer == 0.0).all()


@both
@pytest.mark.parametrize(("rows", "slots"), [(0, 3), (2, 0)])
def test_nothing(implementation, rows, slots):
    hidden, weight = torch.ones(rows, 4), torch.ones(6, 4)
    columns, grad = torch.zeros(rows, slots, dtype=torch.int64), torch.ones(rows, slots)
    assert implementation("logits_at").logits_at(hidden, weight, columns).shape == (rows, slots)
    assert torch.equal(implementation("hidden_grad").hidden_grad(grad, columns, weight), torch.zeros(rows, 4))
    main_grad = torch.ones(6, 4)
    implementation("weight_grad").add_weight_grad(main_grad, grad, columns, hidden)
    assert torch.equal(main_grad, torch.ones(6, 4))
