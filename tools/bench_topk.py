"""Speed of top-K selection on CPU, as a share of that of an exponential and a sum over the same logits.

python tools/bench_topk.py [--json FILE] [--repeats 5]

V = 49,152, N = 2,048, K = 64. Both work on blocks of logits that stay in the cache, as the LM head's passes
do: selection finds the maximum of each tile and from them the K largest; the other takes exp of every logit
and sums it. They take turns, with one thread and with all.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import bench_record
import torch
from torch import Tensor
from troll_kernels.tiles import tile_size
from troll_kernels.topk import top_k
from troll_kernels.transform import CACHED

VOCAB, ROWS, K = 49_152, 2_048, 64


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = [measure(threads, arguments.repeats) for threads in sorted({1, os.cpu_count() or 1})]
    for row in rows:
        print("{threads} threads: top-K {topk_s:.3f} s, exp and sum {exp_s:.3f} s: {speed:.0%}".format(**row))
    if arguments.json is not None:
        bench_record.write(arguments.json, bench_record.record("cpu", rows))
    return 0


def measure(threads: int, repeats: int) -> bench_record.Record:
    torch.set_num_threads(threads)
    block = 3.0 * torch.randn(CACHED // VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    room, tile = torch.empty_like(block), tile_size(VOCAB, K)
    turns = [
        (seconds(lambda: select(block, tile)), seconds(lambda: torch.exp(block, out=room).sum(1)))
        for _ in range(repeats + 1)
    ][1:]
    chosen, summed = (statistics.median(column) for column in zip(*turns))
    speed = statistics.median(exp / topk for topk, exp in turns)
    return {"threads": threads, "topk_s": chosen, "exp_s": summed, "speed": speed, "turns": turns}


def select(block: Tensor, tile: int) -> None:
    top_k(block, block.unflatten(1, (-1, tile)).amax(2), VOCAB, K, tile)


def seconds(work: Callable[[], object]) -> float:
    """Seconds of wall clock for N rows."""
    began = time.perf_counter()
    for _ in range(ROWS // (CACHED // VOCAB)):
        work()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
