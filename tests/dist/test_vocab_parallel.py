"""Vocabulary shards and context-parallel sums on 2 and 4 ranks equal plain torch on one process."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from megatron_troll.parallel import vocab
from megatron_troll.parallel.groups import ALONE, Group
from megatron_troll.parallel.segments import segments
from megatron_troll.types import NO_ID
from tests.dist.harness import RankPool

VOCAB, PADDED, N = 53, 64, 12  # with 4 ranks the last shard holds 5 real tokens and 11 padded ones


def world() -> Group:
    size = dist.get_world_size()
    return Group(dist.group.WORLD, dist.get_rank(), size) if size > 1 else ALONE


def shard(logits: Tensor, group: Group) -> Tensor:
    return logits.chunk(group.size, 1)[group.rank].contiguous()


def read_shard(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    group = world()
    local = shard(logits, group)
    return vocab.log_softmax(local, group, VOCAB), vocab.gather_logits(local, ids, group)


def context_parallel_gradient(values: Tensor, sequence: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's tokens are those with `place` = rank. Its loss reads the totals through its own tokens."""
    group = world()
    mine = place == group.rank
    local = values[mine].requires_grad_()
    by_response = segments(sequence[mine], places(sequence)[mine], 3, group)
    totals = by_response.sum(local)
    loss = (by_response.expand(totals.exp()) * local).sum()
    loss.backward()
    assert local.grad is not None
    return totals.detach(), local.grad


def context_parallel_whole(values: Tensor, sequence: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every token in order as this rank sees it, whose it is, and this rank's own of those again."""
    group = world()
    mine = place == group.rank
    by_response = segments(sequence[mine], places(sequence)[mine], 3, group)
    whole = by_response.whole(values[mine])
    return whole, by_response.owner, by_response.mine(whole)


def places(sequence: Tensor) -> Tensor:
    """The index of each token inside its response."""
    same = sequence[:, None] == sequence
    return same.tril(-1).sum(1)


@pytest.fixture(params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    return request.getfixturevalue(f"ranks{request.param}")


@pytest.mark.parametrize("forbid", [False, True])
def test_log_probs_and_gathered_logits_equal_plain_torch(ranks: RankPool, forbid: bool) -> None:
    """With padded columns that would win if they counted."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(N, PADDED, dtype=torch.float64, generator=generator)
    logits[:, VOCAB:] = 50.0
    if forbid:
        logits[:, ::5] = -torch.inf
        logits[0, 16:32] = -torch.inf
    ids = torch.randint(0, VOCAB, (N, 7), generator=generator)
    ids[:, 3] = ids[:, 4]
    ids[::2, 6] = NO_ID
    results = ranks.run(read_shard, logits, ids)
    logp = torch.cat([part for part, _ in results], 1)
    assert_close(logp[:, :VOCAB], logits[:, :VOCAB].log_softmax(1), rtol=1e-12, atol=1e-12)
    assert (logp[:, VOCAB:] == -torch.inf).all()
    expected = logits.gather(1, ids.clamp(min=0)).masked_fill(ids == NO_ID, -torch.inf)
    assert all(torch.equal(gathered, expected) for _, gathered in results)


def test_totals_of_responses_cross_context_parallel_ranks(ranks: RankPool) -> None:
    size = ranks.world_size
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(30, dtype=torch.float64, generator=generator)
    sequence = torch.arange(30) % 3
    place = torch.randint(0, size, (30,), generator=generator)
    place[sequence == 1] = 0  # one response lies on one rank only
    whole = values.clone().requires_grad_()
    totals = torch.zeros(3, dtype=torch.float64).index_add(0, sequence, whole)
    (totals.exp()[sequence] * whole).sum().backward()
    assert whole.grad is not None
    for rank, (rank_totals, grad) in enumerate(ranks.run(context_parallel_gradient, values, sequence, place)):
        assert_close(rank_totals, totals.detach())
        assert_close(grad, whole.grad[place == rank])


def test_whole_responses_are_seen_in_order_on_every_context_parallel_rank(ranks: RankPool) -> None:
    generator = torch.Generator().manual_seed(1)
    sequence = torch.randint(0, 3, (30,), generator=generator).sort().values
    values = torch.arange(30.0)
    place = torch.randint(0, ranks.world_size, (30,), generator=generator)
    if ranks.world_size == 4:
        place[place == 3] = 0  # one rank has no token
    results = ranks.run(context_parallel_whole, values, sequence, place)
    for rank, (whole, owner, mine) in enumerate(results):
        assert torch.equal(whole, values)
        assert torch.equal(owner, sequence)
        assert torch.equal(mine, values[place == rank])
