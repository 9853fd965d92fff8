"""Attention in parts is that of whole sequences, each apart, under its dense mask."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from megatron_troll.mcore.packing import packed_sequences
from megatron_troll.mcore.tree_attention import attend, attend_masked, block_mask, last_readers
from megatron_troll.parallel.groups import ALONE
from megatron_troll.types import PackedTree

# A prompt of 5 with three responses, one of which forks after 3 tokens, and a prompt of 2 alone, padded by 3.
TREE = PackedTree(parent=(-1, 0, 0, 2, 2, 0, -1), start=(0, 5, 5, 8, 8, 5, 0), length=(5, 4, 3, 2, 1, 7, 2))
STARTS = [0, 5, 9, 12, 14, 15, 22, 27]
HEADS, GROUPS, WIDTH = 4, 2, 8
SCALE = 0.3


def ancestors(i: int) -> list[int]:
    return [] if i == -1 else [*ancestors(TREE.parent[i]), i]


def seen() -> Tensor:
    """[t, t] bool, which keys (columns) a query sees."""
    mask = torch.zeros(STARTS[-1], STARTS[-1], dtype=torch.bool)
    for i, (start, end) in enumerate(pairwise(STARTS)):
        for query in range(start, end):
            mask[query, start : query + 1] = True
            for above in ancestors(TREE.parent[i]):
                mask[query, STARTS[above] : STARTS[above] + TREE.length[above]] = True
    return mask


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    rows = [t.repeat_interleave(HEADS // t.size(1), 1).transpose(0, 1) for t in (query, key, value)]
    scores = (rows[0] @ rows[1].mT * SCALE).masked_fill(~seen(), -torch.inf)
    return (scores.softmax(-1) @ rows[2]).transpose(0, 1)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(STARTS[-1], heads, WIDTH, generator=generator).to(dtype).requires_grad_()
        for heads in (HEADS, GROUPS, GROUPS)
    )
    return query, key, value


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_output_and_gradients_are_those_of_a_dense_mask(dtype: torch.dtype, tolerance: float) -> None:
    packed = packed_sequences(torch.tensor(STARTS, dtype=torch.int32), 12, ALONE, TREE)
    given = inputs(dtype)
    upstream = torch.randn(given[0].shape, generator=torch.Generator().manual_seed(1))
    found = attend(*given, packed.parts, SCALE)
    query, key, value = wide = [tensor.detach().double().requires_grad_() for tensor in given]
    expected = dense(query, key, value)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad((found * upstream).sum(), given)
    wanted = torch.autograd.grad((expected * upstream).sum(), wide)
    for mine, theirs in zip(got, wanted):
        torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=4 * tolerance)


def test_the_mask_of_a_gpu_is_that_mask() -> None:
    """Its kernel has a forward on CPU."""
    query, key, value = (tensor.detach() for tensor in inputs())
    found = attend_masked(query, key, value, block_mask(last_readers(TREE, STARTS)), SCALE)
    torch.testing.assert_close(found, dense(query, key, value), rtol=1e-5, atol=1e-6)


def test_positions_go_on_from_the_end_of_a_prefix() -> None:
    packed = packed_sequences(torch.tensor(STARTS, dtype=torch.int32), 12, ALONE, TREE)
    assert packed.position is not None
    assert packed.position[5:15].tolist() == [5, 6, 7, 8, 5, 6, 7, 8, 9, 8]
