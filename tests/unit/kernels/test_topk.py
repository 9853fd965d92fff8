import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from troll_kernels import topk
from troll_kernels.rows import row_statistics
from troll_kernels.sparsify import NO_ID
from troll_kernels.transform import IDENTITY

from tests.unit.kernels.implementations import both, kernel

INF = float("inf")


def tile_max(x: Tensor, width: int, tile: int) -> Tensor:
    return row_statistics(x, width, torch.zeros(len(x), dtype=torch.int64), IDENTITY, tile).tile_max


def expected(x: Tensor, width: int, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Value descending, then column ascending; -inf and NO_ID where the row has fewer."""
    values, columns = [], []
    for row in x[:, :width].tolist():
        order = sorted(range(width), key=lambda column: (-row[column], column))[:k]
        values.append([row[column] for column in order] + [-INF] * (k - len(order)))
        columns.append(order + [NO_ID] * (k - len(order)))
    return values, columns


@pytest.mark.parametrize("k", [1, 7, 40, 97])
@pytest.mark.parametrize("steps", [1, 2, 8, 1000])
def test_the_largest_of_a_row_break_ties_by_position(k: int, steps: int) -> None:
    x = torch.randint(0, steps, (30, 97), generator=torch.Generator().manual_seed(k)) / 8.0
    order = x.sort(dim=1, descending=True, stable=True)
    values, at = topk.largest(x, k)
    assert torch.equal(values, order.values[:, :k])
    assert torch.equal(at, order.indices[:, :k])


def test_signed_zeros_and_minus_infinity_are_ordered_by_position() -> None:
    values, at = topk.largest(torch.tensor([[-0.0, -INF, 0.0, -0.0, -INF]]), 4)
    assert at.tolist() == [[0, 2, 3, 1]]
    assert values.tolist() == [[0.0, 0.0, 0.0, -INF]]
    assert not values[:, :3].signbit().any()


def test_the_largest_of_no_rows() -> None:
    values, at = topk.largest(torch.zeros(0, 5), 2)
    assert values.shape == at.shape == (0, 2)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("width", "held", "k", "tile"),
    [
        (1000, 1008, 7, 32),
        (1000, 1000, 64, 128),
        (130, 144, 256, 32),
        (5, 5, 3, 32),
        (40, 64, 40, 32),
        (9, 9, 1, 32),
    ],
)
def test_exact_order(implementation, dtype, width, held, k, tile):
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(3, held, generator=generator).to(dtype)
    x[1] = (
        torch.randint(-2, 3, (held,), generator=generator) / 2
    )  # nothing but ties, +0.0 and -0.0 among them
    x[1, ::3] *= -1
    x[2, 2:] = -INF
    values, columns = implementation("topk").top_k(x, tile_max(x, width, tile), width, k, tile)
    assert (values.tolist(), columns.tolist()) == expected(x.float(), width, k)


@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 300),
    k=st.integers(1, 40),
    levels=st.integers(1, 60),
)
@settings(max_examples=60, deadline=None)
def test_ties_of_any_number(seed, width, k, levels):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, levels, (4, width), generator=generator).double()
    values, columns = topk.top_k(x, tile_max(x, width, 32), width, k, 32)
    assert (values.tolist(), columns.tolist()) == expected(x, width, k)


@both
def test_a_shard_of_padding_has_no_token(implementation):
    x = torch.ones(2, 16)
    values, columns = implementation("topk").top_k(x, tile_max(x, 0, 32), 0, 3, 32)
    assert (values == -INF).all()
    assert (columns == NO_ID).all()


def test_more_than_registers_hold_is_refused():
    x = torch.zeros(1, 300)
    with pytest.raises(ValueError, match="k=257: the Triton kernels keep at most 256"):
        kernel("topk").top_k(x, tile_max(x, 300, 32), 300, 257, 32)
