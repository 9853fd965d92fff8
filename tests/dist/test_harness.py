"""The rank pool itself: results in rank order, failures with their rank, and recovery after a hang."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist.harness import RankError, RankPool


def total_of_ranks(bias: int) -> tuple[int, int, int]:
    """This rank, the sum over ranks of (rank + bias), and the process id."""
    value = torch.tensor([dist.get_rank() + bias])
    dist.all_reduce(value)
    return dist.get_rank(), int(value), os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("bad shard")
    dist.barrier()


def fail_everywhere() -> None:
    raise ValueError(f"bad shard on {dist.get_rank()}")


def sleep_on(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(30)


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)


def thread_count() -> tuple[int, str]:
    return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]


def test_results_come_in_rank_order_from_processes_that_stay(ranks2: RankPool) -> None:
    first = ranks2.run(total_of_ranks, 10)
    second = ranks2.run(total_of_ranks, 0)
    assert [r[:2] for r in first] == [(0, 21), (1, 21)]
    assert [r[:2] for r in second] == [(0, 1), (1, 1)]
    assert [r[2] for r in first] == [r[2] for r in second]
    assert ranks2.run(thread_count) == [(1, "1")] * 2


def test_an_exception_on_every_rank_keeps_the_processes(ranks2: RankPool) -> None:
    before = ranks2.run(total_of_ranks, 0)
    with pytest.raises(RankError, match="rank 1 of 2: ValueError: bad shard on 1"):
        ranks2.run(fail_everywhere)
    assert ranks2.run(total_of_ranks, 0) == before


def test_failures_name_the_rank_and_the_pool_recovers() -> None:
    with RankPool(2, timeout_s=3.0) as pool:
        with pytest.raises(RankError, match=r"rank 1 of 2: ValueError: bad shard[\s\S]*in fail_on"):
            pool.run(fail_on, 1)
        with pytest.raises(RankError, match=r"ranks \[0\] of 2 did not answer within 3 s"):
            pool.run(sleep_on, 0)
        with pytest.raises(RankError, match="rank 1 of 2: the process died with exit code 3"):
            pool.run(die_on, 1)
        assert [r[:2] for r in pool.run(total_of_ranks, 0)] == [(0, 1), (1, 1)]
