"""The head of a shard against dense float64 autograd, and shards against the whole."""

import pytest
import torch
from torch import Tensor
from troll_kernels.head import Shard, candidates, chunk_size, dense_statistics, sparse_logits
from troll_kernels.project import project
from troll_kernels.sparsify import select, sparse_logp
from troll_kernels.transform import Transform

ROWS, SIZE, VOCAB, PADDED = 9, 6, 50, 64
SHARD = Shard(VOCAB, chunk=4, transform=Transform(0.8, cap=6.0))


@pytest.fixture
def head() -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight with rows of padding, target; float64."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(PADDED, SIZE, generator=generator, dtype=torch.float64, requires_grad=True)
    return hidden, weight, torch.randint(0, VOCAB, (ROWS,), generator=generator)


def dense_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return SHARD.transform.apply(hidden @ weight[:VOCAB].T)


def gradients(loss: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, (hidden, weight))


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_candidates_are_the_dense_top_k(head):
    hidden, weight, target = head
    got = candidates(hidden, weight, target, 7, SHARD)
    raw = (hidden @ weight[:VOCAB].T).detach()
    values, columns = raw.topk(7)
    torch.testing.assert_close(got.values, values)
    assert torch.equal(got.columns, columns)
    torch.testing.assert_close(got.lse, dense_logits(hidden, weight).logsumexp(1).detach())
    torch.testing.assert_close(got.target, raw.gather(1, target[:, None])[:, 0])


@pytest.mark.parametrize("values_given", [True, False])
def test_troll_through_the_sparse_head_is_the_dense_gradient(head, values_given):
    """The theorem of ALGORITHMS 1.7: with the support fixed, K columns carry the whole gradient."""
    hidden, weight, target = head
    found = candidates(hidden, weight, target, 7, SHARD)
    columns, raw, count, place = select(found.values, found.columns, found.lse, target, found.target, 1e-3)

    def loss(logits: Tensor) -> Tensor:
        shift = torch.linspace(-2.0, 2.0, columns.shape[1], dtype=logits.dtype)
        new = sparse_logp(logits, count, VOCAB, 1e-4)
        old = sparse_logp(logits.detach() + shift, count, VOCAB, 1e-4)
        bound = torch.full((ROWS,), 0.05, dtype=logits.dtype)
        projection = project(columns, new, columns, old, bound, VOCAB, 1e-4)
        assert projection.active.any()
        return projection.new.gather(1, place[:, None]).sum() + projection.kl_new_pi.sum()

    given = raw if values_given else None
    sparse = SHARD.transform.apply(sparse_logits(hidden, weight, columns, given))
    dense = dense_logits(hidden, weight).gather(1, columns.clamp(min=0)).masked_fill(columns < 0, -torch.inf)
    torch.testing.assert_close(sparse, dense)
    same(gradients(loss(sparse), hidden, weight), gradients(loss(dense), hidden, weight))


@pytest.mark.parametrize("reads", [("lse",), ("lse", "target"), ("lse", "mean"), ("mean", "target")])
def test_dense_statistics_against_autograd(head, reads):
    hidden, weight, target = head
    factor = torch.linspace(-1.0, 1.0, ROWS, dtype=torch.float64)
    got = dense_statistics(hidden, weight, target, SHARD)
    logits = dense_logits(hidden, weight)
    expected = {
        "lse": logits.logsumexp(1),
        "mean": (logits.softmax(1) * logits).sum(1),
        "target": (hidden @ weight.T).gather(1, target[:, None])[:, 0],
    }
    mine, theirs = torch.zeros(()), torch.zeros(())
    for power, name in enumerate(reads, start=1):
        torch.testing.assert_close(getattr(got, name), expected[name])
        mine = mine + (getattr(got, name) * factor**power).sum()
        theirs = theirs + (expected[name] * factor**power).sum()
    same(gradients(mine, hidden, weight), gradients(theirs, hidden, weight))


def test_shards_add_up_to_the_whole(head):
    """The caller's part under tensor parallelism: logsumexp over shards, and ordinary autograd."""
    hidden, weight, target = head
    whole = dense_statistics(hidden, weight, target, SHARD)
    expected = gradients((whole.lse + whole.mean * whole.target).sum(), hidden, weight)
    half = PADDED // 2
    parts = [
        dense_statistics(hidden, shard, target - start, Shard(min(VOCAB - start, half), 3, SHARD.transform))
        for start, shard in ((0, weight[:half]), (half, weight[half:]))
    ]
    lse = torch.logaddexp(parts[0].lse, parts[1].lse)
    mean = sum(((part.lse - lse).exp() * part.mean for part in parts), torch.zeros(()))
    owner = parts[0].target.where(target < half, parts[1].target)
    same(gradients((lse + mean * owner).sum(), hidden, weight), expected)


@pytest.mark.parametrize("read", ["sparse", "dense"])
def test_main_grad_takes_the_gradient_instead_of_autograd(head, read):
    hidden, weight, target = head

    def loss(main_grad: Tensor | None) -> Tensor:
        if read == "sparse":
            return sparse_logits(hidden, weight, target[:, None], main_grad=main_grad).square().sum()
        statistics = dense_statistics(hidden, weight, target, SHARD, main_grad)
        return (statistics.lse - statistics.target).square().sum()

    (expected,) = torch.autograd.grad(loss(None), weight)
    main_grad = torch.ones_like(weight)
    loss(main_grad).backward()
    torch.testing.assert_close(main_grad - 1.0, expected)
    assert weight.grad is None
    assert hidden.grad is not None


def test_chunks_change_nothing(head):
    hidden, weight, target = head
    for chunk in (1, 5, ROWS, 100):
        got = candidates(hidden, weight, target, 3, Shard(VOCAB, chunk))
        expected = candidates(hidden, weight, target, 3, Shard(VOCAB, ROWS))
        torch.testing.assert_close(tuple(got), tuple(expected))


def test_bf16_heads_sum_in_float32(head):
    hidden, weight, target = (part.detach() for part in head)
    low = hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    columns = torch.stack([target, torch.full_like(target, -1)], 1)
    got = sparse_logits(*low, columns)
    exact = (low[0].double() @ low[1].double().T).gather(1, target[:, None])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got[:, :1].double(), exact, rtol=1e-6, atol=1e-6)
    main_grad = torch.zeros(PADDED, SIZE)
    statistics = dense_statistics(*low, target, SHARD, main_grad)
    (got[:, 0].sum() + statistics.lse.sum()).backward()
    assert low[0].grad is not None
    assert low[0].grad.dtype == torch.bfloat16
    assert main_grad.abs().sum() > 0


def test_no_rows(head):
    _, weight, _ = head
    hidden = torch.zeros(0, SIZE, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64)
    assert candidates(hidden, weight, target, 3, SHARD).columns.shape == (0, 3)
    logits = sparse_logits(hidden, weight, target[:, None])
    statistics = dense_statistics(hidden, weight, target, SHARD)
    (logits.sum() + statistics.lse.sum()).backward()
    assert weight.grad is not None
    assert (weight.grad == 0.0).all()


def test_chunks_are_small_on_cpu():
    assert chunk_size(torch.device("cpu")) < chunk_size(torch.device("cuda"))
