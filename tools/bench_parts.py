"""Times of the parts of the head, and rates of the machine that bench_head.py compares with."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from bench_case import Case, Shape, Work
from torch import Tensor
from troll_kernels.head import Shard, chunk_size
from troll_kernels.project import project
from troll_kernels.rows import row_statistics
from troll_kernels.sparsify import sparse_logp
from troll_kernels.tiles import tile_size
from troll_kernels.topk import top_k

COPIED = 2**27  # elements


@dataclass(frozen=True)
class Rates:
    """Rates of one machine in one dtype: GB/s read and written by a copy, TFLOP/s of a matrix product."""

    copy_gb_s: float
    matrix_tflops: float

    def least_ms(self, work: Work, shape: Shape) -> float:
        """The time of products at the matrix rate, plus that of memory traffic at the rate of a copy."""
        size = torch.finfo(shape.dtype).bits // 8
        flop = 2 * work.products * shape.tokens * shape.hidden * shape.vocab
        columns = work.columns * shape.tokens * shape.k * shape.hidden
        moved = size * (work.rows * shape.tokens * shape.vocab + columns)
        return 1e3 * (flop / (1e12 * self.matrix_tflops) + moved / (1e9 * self.copy_gb_s))


@dataclass(frozen=True)
class Part:
    """Time of one part of the head alone, over the N tokens of a shape."""

    shape: str
    part: str
    ms: float
    gb_s: float | None = None


def rates(shape: Shape, device: str, repeats: int) -> Rates:
    source = torch.ones(COPIED, dtype=shape.dtype, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    left = torch.randn(chunk_size(source.device), shape.hidden, device=device).to(shape.dtype)
    right = torch.randn(shape.vocab, shape.hidden, device=device).to(shape.dtype)
    flop = 2 * len(left) * shape.hidden * shape.vocab
    copy = median_s(lambda: target.copy_(source), device, repeats)
    product = median_s(lambda: left @ right.t(), device, repeats)
    return Rates(moved / copy / 1e9, flop / product / 1e12)


def parts(name: str, shape: Shape, case: Case, device: str, repeats: int) -> Iterator[Part]:
    yield selection(name, shape, case, device, repeats)
    yield projection(name, shape, device, repeats)


def selection(name: str, shape: Shape, case: Case, device: str, repeats: int) -> Part:
    """Logsumexp and top-K of given logits; `gb_s` is the rate at which it reads them."""
    shard = Shard(shape.vocab, chunk_size(case.weight.device))
    rows = min(shard.chunk, shape.tokens)
    with torch.no_grad():
        logits = case.hidden[:rows] @ case.weight.t()
    tile = tile_size(shape.vocab, shape.k)

    def work() -> None:
        found = row_statistics(logits, shape.vocab, case.target[:rows], shard.transform, tile)
        top_k(logits, found.tile_max, shape.vocab, shape.k, tile)

    seconds = median_s(work, device, repeats)
    read = logits.numel() * logits.element_size()
    return Part(name, "logsumexp and top-K", 1e3 * seconds * shape.tokens / rows, read / seconds / 1e9)


def projection(name: str, shape: Shape, device: str, repeats: int) -> Part:
    """Projection, forward and backward, of policies a small step apart, all outside a bound of 1e-6."""
    generator = torch.Generator(device).manual_seed(0)
    size = (shape.tokens, shape.k + 1)
    new = (4.0 * torch.randn(size, generator=generator, device=device)).requires_grad_()
    old = new.detach() + 0.1 * torch.randn(size, generator=generator, device=device)
    ids = torch.arange(size[1], device=device).expand(size).contiguous()
    count = torch.full((shape.tokens,), size[1], device=device)
    bound = torch.full((shape.tokens,), 1e-6, device=device)
    before = sparse_logp(old, count, shape.vocab, 1e-12)

    def work() -> None:
        found = project(
            ids, sparse_logp(new, count, shape.vocab, 1e-12), ids, before, bound, shape.vocab, 1e-12
        )
        (found.new[:, 0].sum() + found.kl_new_pi.sum()).backward()

    return Part(name, "projection", 1e3 * median_s(work, device, repeats))


def median_s(work: Callable[[], Tensor | None], device: str, repeats: int) -> float:
    """Median of the seconds of `repeats` runs, after one warm-up run."""
    taken = []
    for _ in range(repeats + 1):
        began = now(device)
        work()
        taken.append(now(device) - began)
    return statistics.median(taken[1:])


def now(device: str) -> float:
    """Seconds of a clock, read after waiting for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
