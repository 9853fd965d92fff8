"""Causal attention of the last positions against plain float64 autograd on the masked scores."""

import pytest
import torch
from torch import Tensor

from megatron_troll.mcore.attention import attend_suffix

SCALE = 0.3


def masked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    shared = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    positions = torch.arange(key.size(2))
    hidden = positions[-query.size(2) :, None] < positions
    scores = (query @ key.transpose(2, 3) * SCALE).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ value


@pytest.mark.parametrize(("positions", "queries"), [(1, 1), (13, 4), (40, 40), (600, 77)])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_the_result_and_its_gradients_are_those_of_masked_attention(
    positions: int, queries: int, groups: int
) -> None:
    generator = torch.Generator().manual_seed(positions + groups)
    tensors = [
        torch.randn(2, heads, length, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for heads, length in ((4, queries), (groups, positions), (groups, positions))
    ]
    attended, expected = attend_suffix(*tensors, SCALE), masked(*tensors)
    grad = torch.randn(attended.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(attended, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(attended, tensors, grad), torch.autograd.grad(expected, tensors, grad)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_bf16_stays_bf16() -> None:
    query, key = torch.randn(1, 2, 5, 8).bfloat16(), torch.randn(1, 2, 9, 8).bfloat16()
    attended = attend_suffix(query, key, key, SCALE)
    assert attended.dtype == torch.bfloat16
    torch.testing.assert_close(
        attended.float(), masked(query.float(), key.float(), key.float()), rtol=0, atol=2e-2
    )
