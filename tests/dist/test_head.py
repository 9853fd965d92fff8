"""The LM head over vocabulary shards on 1, 2 and 4 ranks equals plain float64 torch on whole rows: values,
and the gradients of hidden states and weight."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close
from troll_kernels import head as kernels
from troll_kernels.transform import Transform

from megatron_troll.config import Layout, Model
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.head_kl import full_kl
from megatron_troll.mcore.head_shard import HeadShard
from megatron_troll.mcore.model import build
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel import shards
from megatron_troll.parallel.groups import ALONE, Group
from megatron_troll.types import NO_ID, HeadRequest
from megatron_troll.weights.load import load
from megatron_troll.weights.source import RandomSource
from tests.dist.harness import RankPool
from tests.dist.tiny import DENSE, started

# Of 4 ranks the last has 5 tokens and 11 rows of padding; with FEW tokens, two ranks have padding alone.
VOCAB, FEW, PADDED, SIZE, CHUNK = 53, 20, 64, 6, 3
LAWS = ((1.0, None), (0.7, None), (0.7, 3.0))  # temperature, soft-cap


@dataclass(frozen=True)
class Case:
    """Hidden states [N, SIZE] of a policy and a reference, their heads [PADDED, SIZE] whose padding would win
    if it counted, sampled tokens [N], and ids [N, 7] with repeats and unused slots."""

    hidden: Tensor
    weight: Tensor
    frozen_hidden: Tensor
    frozen_weight: Tensor
    target: Tensor
    ids: Tensor
    upstream: Tensor
    vocab: int
    main_grad: bool
    temperature: float = 1.0
    cap: float | None = None

    def plain(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits [N, vocab]: the soft-cap first, then the temperature."""
        logits = hidden @ weight[: self.vocab].T
        return (logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)) / self.temperature


@dataclass(frozen=True)
class Result:
    """What one rank (or the oracle) read, and the gradients of all of it: `by_autograd` is None where the
    weight's went to main_grad instead."""

    values: tuple[Tensor, ...]
    hidden: Tensor
    weight: Tensor
    by_autograd: Tensor | None = None


def make_case(n: int, vocab: int, main_grad: bool) -> Case:
    generator = torch.Generator().manual_seed(n + vocab)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = normal(n, SIZE)
    hidden[:, 0] = hidden[:, 0].abs() + 1
    weight, frozen_weight = normal(PADDED, SIZE), normal(PADDED, SIZE)
    weight[vocab:, 0] = frozen_weight[vocab:, 0] = 50.0
    ids = torch.randint(0, vocab, (n, 7), generator=generator)
    ids[:, 3] = ids[:, 4]
    ids[::2, 6] = NO_ID
    upstream = normal(n, 7)
    target = torch.randint(0, vocab, (n,), generator=generator)
    frozen_hidden = normal(n, SIZE)
    return Case(hidden, weight, frozen_hidden, frozen_weight, target, ids, upstream, vocab, main_grad)


def world() -> Group:
    size = dist.get_world_size()
    return Group(dist.group.WORLD, dist.get_rank(), size) if size > 1 else ALONE


def head_of(whole: Tensor, case: Case, main_grad: bool) -> HeadShard:
    """This rank's part of a head, whose weight is a leaf."""
    group = world()
    weight = whole.chunk(group.size)[group.rank].clone().requires_grad_(not main_grad)
    first = group.rank * len(weight)
    width = min(max(case.vocab - first, 0), len(weight))
    shard = kernels.Shard(width, CHUNK, Transform(case.temperature, case.cap))
    return HeadShard(weight, torch.zeros_like(weight) if main_grad else None, first, case.vocab, shard, group)


def rows_of_shard(head: HeadShard, hidden: Tensor, case: Case) -> tuple[Tensor, ...]:
    rows = head.rows(hidden, case.target)
    return rows.lse, rows.entropy, rows.target


def plain_rows(logits: Tensor, case: Case) -> tuple[Tensor, ...]:
    logp = logits.log_softmax(1)
    target = logits.gather(1, case.target[:, None])[:, 0]
    return logits.logsumexp(1), -(logp.exp() * logp).sum(1), target


def logits_of_shard(head: HeadShard, hidden: Tensor, case: Case) -> tuple[Tensor, ...]:
    """Two records of one head."""
    return head.logits_at(hidden, case.ids), head.logits_at(hidden, case.ids[:, 2:5].flip(0))


def plain_logits(logits: Tensor, case: Case) -> tuple[Tensor, ...]:
    unused = case.ids == NO_ID
    at_ids = logits.gather(1, case.ids.clamp(min=0)).masked_fill(unused, -torch.inf)
    return at_ids, logits.gather(1, case.ids[:, 2:5].flip(0))


def kl_of_shard(head: HeadShard, hidden: Tensor, case: Case) -> tuple[Tensor, ...]:
    frozen = head_of(case.frozen_weight, case, main_grad=False)
    lse, frozen_lse = head.rows(hidden, case.target).lse, frozen.rows(case.frozen_hidden, case.target).lse
    return (full_kl(head, hidden, lse, frozen, case.frozen_hidden, frozen_lse),)


def plain_kl(logits: Tensor, case: Case) -> tuple[Tensor, ...]:
    reference = case.plain(case.frozen_hidden, case.frozen_weight)
    logp = logits.log_softmax(1)
    return ((logp.exp() * (logp - reference.log_softmax(1))).sum(1),)


def everything_of_shard(head: HeadShard, hidden: Tensor, case: Case) -> tuple[Tensor, ...]:
    """A record, whole rows and a KL in one loss: what each does to the weight adds up."""
    return tuple(value for read in OF_SHARD.values() for value in read(head, hidden, case))


def plain_everything(logits: Tensor, case: Case) -> tuple[Tensor, ...]:
    return tuple(value for read in PLAIN.values() for value in read(logits, case))


Reading = Callable[[HeadShard, Tensor, Case], tuple[Tensor, ...]]
Plain = Callable[[Tensor, Case], tuple[Tensor, ...]]
OF_SHARD: dict[str, Reading] = {"rows": rows_of_shard, "logits_at": logits_of_shard, "kl": kl_of_shard}
PLAIN: dict[str, Plain] = {"rows": plain_rows, "logits_at": plain_logits, "kl": plain_kl}
READINGS: dict[str, tuple[Reading, Plain]] = {name: (OF_SHARD[name], PLAIN[name]) for name in PLAIN}
READINGS["everything"] = everything_of_shard, plain_everything


def differentiate(values: tuple[Tensor, ...], upstream: Tensor) -> None:
    """Each of `values` [N] or [N, W] with its own part of `upstream`, all of them at once."""
    parts = [upstream[:, i] if value.dim() == 1 else upstream[:, : value.shape[1]]
             for i, value in enumerate(values)]  # fmt: skip
    torch.autograd.backward(values, parts)


def read_shard(read: Reading, case: Case) -> Result:
    head, hidden = head_of(case.weight, case, case.main_grad), case.hidden.clone().requires_grad_()
    values = read(head, hidden, case)
    differentiate(values, case.upstream)
    found = head.weight.grad if head.main_grad is None else head.main_grad
    assert hidden.grad is not None
    assert found is not None
    return Result(tuple(value.detach() for value in values), hidden.grad, found, head.weight.grad)


def read_whole(read: Plain, case: Case) -> Result:
    """Oracle: autograd through plain torch on whole rows."""
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    values = read(case.plain(hidden, weight), case)
    differentiate(values, case.upstream)
    assert hidden.grad is not None
    assert weight.grad is not None
    return Result(tuple(value.detach() for value in values), hidden.grad, weight.grad)


@pytest.fixture(params=[1, 2, 4])
def ranks(request: pytest.FixtureRequest) -> RankPool:
    return request.getfixturevalue(f"ranks{request.param}")


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("reading", READINGS)
def test_values_and_gradients_equal_plain_torch(ranks: RankPool, reading: str, main_grad: bool) -> None:
    """With 0 rows, and with rows that neither ranks nor chunks divide."""
    of_shard, plain = READINGS[reading]
    for n, vocab, (temperature, cap) in product((0, 7), (VOCAB, FEW), LAWS):
        case = replace(make_case(n, vocab, main_grad), temperature=temperature, cap=cap)
        oracle, results = read_whole(plain, case), ranks.run(read_shard, of_shard, case)
        for result in results:
            for value, same, expected in zip(result.values, results[0].values, oracle.values, strict=True):
                assert_close(value, expected, rtol=1e-12, atol=1e-12)
                assert torch.equal(value, same)
            assert (result.by_autograd is None) == main_grad
        assert_close(sum(result.hidden for result in results), oracle.hidden, rtol=1e-10, atol=1e-12)
        weight = torch.cat([result.weight for result in results])
        assert_close(weight, oracle.weight, rtol=1e-10, atol=1e-12)
        assert (weight[vocab:] == 0).all()


def add_to_main_grad(case: Case) -> tuple[Tensor, Tensor]:
    """What main_grad gains where it holds ones already, and what it has from zeros."""
    gained = []
    for start in (1.0, 0.0):
        head = head_of(case.weight, case, main_grad=True)
        assert head.main_grad is not None
        head.main_grad.fill_(start)
        differentiate(everything_of_shard(head, case.hidden.clone().requires_grad_(), case), case.upstream)
        gained.append(head.main_grad - start)
    return gained[0], gained[1]


def test_main_grad_keeps_what_other_micro_batches_put_there(ranks2: RankPool) -> None:
    for gained, alone in ranks2.run(add_to_main_grad, make_case(7, VOCAB, main_grad=True)):
        assert alone.abs().max() > 0.1
        assert_close(gained, alone, rtol=1e-10, atol=1e-12)


def select(case: Case, k: int) -> tuple[Tensor, ...]:
    head = head_of(case.weight, case, main_grad=False)
    rows, values, ids = head.selection(case.hidden.clone().requires_grad_(), case.target, k)
    return values, ids, rows.lse, rows.entropy, rows.target


def tied_case(n: int, vocab: int) -> Case:
    """Small whole numbers: logits are exact, and tie inside shards, across them and across the k-th place."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randint(-1, 3, (n, SIZE), generator=generator).double()
    hidden[:1] = 0.0  # a row where every token ties
    weight = torch.randint(-1, 2, (PADDED, SIZE), generator=generator).double()
    weight[vocab:] = 9.0
    target = torch.randint(0, vocab, (n,), generator=generator)
    none = hidden[:0]
    return Case(hidden, weight, none, none, target, none, none, vocab, main_grad=False, temperature=0.5)


@pytest.mark.parametrize("k", [0, 1, 6, 20, 53, 80])
def test_selection_is_the_same_for_every_shard_count(ranks: RankPool, k: int) -> None:
    """k beyond a shard's tokens, and beyond V."""
    for n, vocab in product((0, 7), (VOCAB, FEW)):
        case = tied_case(n, vocab)
        logits = case.plain(case.hidden, case.weight)
        order = logits.sort(dim=1, descending=True, stable=True)
        for values, ids, *rows in ranks.run(select, case, k):
            assert torch.equal(ids, order.indices[:, :k])
            assert torch.equal(values, order.values[:, :k])
            assert not any(tensor.requires_grad for tensor in (values, *rows))
            for row, expected in zip(rows, plain_rows(logits, case), strict=True):
                assert_close(row, expected, rtol=1e-12, atol=1e-12)


def stack_own(numbers: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    group = world()
    local = numbers[group.rank].clone().requires_grad_()
    whole = shards.stacked(local, group)
    whole.backward(upstream)
    assert local.grad is not None
    return whole.detach(), local.grad


def test_stacked_rows_are_everyone_s_and_the_gradient_is_one_s_own(ranks: RankPool) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers, upstream = torch.randn(2, ranks.world_size, 5, generator=generator)
    for rank, (whole, grad) in enumerate(ranks.run(stack_own, numbers, upstream)):
        assert torch.equal(whole, numbers)
        assert torch.equal(grad, upstream[rank])


def fetch(offered: Tensor, ids: Tensor, owner: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    group = world()
    local = offered[group.rank].clone().requires_grad_()
    whole = shards.from_owners(local, ids, owner == group.rank, group)
    whole.backward(upstream)
    assert local.grad is not None
    return whole.detach(), local.grad


def test_values_come_from_their_owner_and_unused_slots_give_no_gradient(ranks: RankPool) -> None:
    """What others offer for an id does not count, NaN and -inf neither."""
    generator = torch.Generator().manual_seed(0)
    size, shape = ranks.world_size, (5, 4)
    ids = torch.randint(0, VOCAB, shape, generator=generator)
    ids[1], ids[:, 3] = NO_ID, NO_ID
    owner = torch.randint(0, size, shape, generator=generator).masked_fill(ids == NO_ID, -1)
    values, upstream = torch.randn(2, *shape, generator=generator)
    offered = torch.full((size, *shape), torch.nan)
    for rank in range(size):
        offered[rank] = torch.where(owner == rank, values, offered[rank])
    offered[-1][owner != size - 1] = -torch.inf
    upstream[ids == NO_ID] = torch.nan
    for rank, (whole, grad) in enumerate(ranks.run(fetch, offered, ids, owner, upstream)):
        assert torch.equal(whole, values.masked_fill(ids == NO_ID, -torch.inf))
        assert torch.equal(grad, upstream.masked_fill(owner != rank, 0.0))


def merge_own(values: Tensor, ids: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    group = world()
    return shards.merged(values[group.rank], ids[group.rank], group, vocab)


@pytest.mark.parametrize("n", [0, 5, 8])
def test_merged_candidates_are_those_of_a_whole_sort(ranks: RankPool, n: int) -> None:
    """The last shard has 2 tokens for 6 places; tokens ruled out (-inf) come before places without one."""
    size, k, width = ranks.world_size, 6, 16
    vocab = width * (size - 1) + 2
    logits = torch.randn(n, vocab, generator=torch.Generator().manual_seed(n)).round()
    logits[:1], logits[1:2, 1:] = 0.0, -torch.inf
    order = logits.sort(dim=1, descending=True, stable=True)
    values = torch.full((size, n, k), -torch.inf)
    ids = torch.full((size, n, k), NO_ID)
    for rank, part in enumerate(logits.split(width, 1)):
        best = part.sort(dim=1, descending=True, stable=True)
        some = min(k, part.shape[1])
        values[rank, :, :some] = best.values[:, :some]
        ids[rank, :, :some] = best.indices[:, :some] + rank * width
    for got, got_ids in ranks.run(merge_own, values, ids, vocab):
        assert torch.equal(got, order.values[:, :k])
        assert torch.equal(got_ids, order.indices[:, :k])


def collisions(tp: int) -> tuple[Tensor | None, Tensor]:
    """As read, and from whole rows, at a temperature that is not 1."""
    layout, shape = Layout(tp=tp), shape_of(DENSE)
    with started(layout) as groups:
        model = build(Model(path="", dtype="fp32", layout=layout), shape, groups)
        load(model, RandomSource(shape, seed=3))
        generator = torch.Generator().manual_seed(0)
        hidden = 40 * torch.randn(9, shape.hidden, generator=generator)
        target = torch.randint(0, shape.vocab, (9,), generator=generator)
        head = Head(model, temperature=0.7)
        rows = torch.cat(groups.tp.all_gather(head.log_probs(hidden)), -1)
        return head.read(
            hidden, target, HeadRequest(logp=True, collision=True)
        ).collision, rows.exp().square().sum(1)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_collision_probability_is_that_of_whole_rows(tp: int, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{tp}")
    for read, rows in pool.run(collisions, tp):
        torch.testing.assert_close(read, rows, rtol=2e-5, atol=0)
        assert rows.max() > 2 * rows.min()
