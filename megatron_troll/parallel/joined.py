"""The ranks of a command that does without a model's layout."""

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megatron_troll.parallel.groups import ALONE, Group


@contextmanager
def joined(timeout: datetime.timedelta) -> Iterator[Group]:
    """The ranks that torchrun or srun started, over gloo, until the block ends; without RANK this process
    alone. RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are in the environment. Blocks until all are there;
    raises torch.distributed.DistError where they are not within `timeout`, which bounds collectives too."""
    if "RANK" not in os.environ:
        yield ALONE
        return
    dist.init_process_group("gloo", timeout=timeout)
    try:
        yield Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
