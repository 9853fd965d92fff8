"""A second layout on the ranks of the first leaves the first as it is; layouts that end leave nothing."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_troll.config import Layout
from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.mcore.parallel import also, inside
from megatron_troll.parallel.groups import Group, Groups
from tests.dist.harness import RankPool
from tests.dist.tiny import started

FIRST, SECOND = Layout(tp=2, ep=2), Layout(cp=2)


def current() -> dict[str, int]:
    """The sizes that Megatron's functions find."""
    state: Any = parallel_state
    return {
        "tp": state.get_tensor_model_parallel_world_size(),
        "cp": state.get_context_parallel_world_size(),
        "ep": state.get_expert_model_parallel_world_size(),
        "dp_cp": state.get_data_parallel_world_size(with_context_parallel=True),
    }


OF_FIRST = {"tp": 2, "cp": 1, "ep": 2, "dp_cp": 1}
OF_SECOND = {"tp": 1, "cp": 2, "ep": 1, "dp_cp": 2}


def groups_are(groups: Groups) -> bool:
    """Whether Megatron has just the groups, buffers and sizes of `groups`."""
    return all(getattr(parallel_state, name) is value for name, value in groups.state.items())


def test_a_second_layout_is_current_only_inside_its_block(ranks2: RankPool) -> None:
    ranks2.run(enter_and_leave)


def enter_and_leave() -> None:
    with started(FIRST) as first:
        second = also(SECOND)
        assert groups_are(first)
        assert current() == OF_FIRST
        with inside(second):
            assert groups_are(second)
            assert current() == OF_SECOND
            with inside(first):
                assert current() == OF_FIRST
            assert current() == OF_SECOND
        assert groups_are(first)
        assert current() == OF_FIRST


def test_an_error_inside_gives_the_first_layout_back(ranks2: RankPool) -> None:
    ranks2.run(fail_inside)


def fail_inside() -> None:
    with started(FIRST) as first:
        second = also(SECOND)
        with pytest.raises(KeyError), inside(second):
            raise KeyError
        assert groups_are(first)
        with pytest.raises(ValueError, match="tp x pp x cp = 3"):
            also(Layout(tp=3))
        assert groups_are(first)


def test_the_groups_of_both_layouts_work(ranks2: RankPool) -> None:
    assert ranks2.run(sums) == [(3.0, 3.0)] * 2


def sums() -> tuple[float, float]:
    """Of 1 + rank, over the first layout's tensor and the second's context group."""
    with started(FIRST) as first:
        second = also(SECOND)
        own = torch.tensor(1.0 + first.world.rank)
        return first.tp.all_reduce(own.clone()).item(), second.cp.all_reduce(own.clone()).item()


def test_a_layout_that_ends_leaves_no_threads(ranks2: RankPool) -> None:
    after_one, after_another = ranks2.run(threads)[0], ranks2.run(threads)[0]
    assert after_another == after_one


def threads() -> int:
    """Of this rank, after two layouts have come and gone: each process group has some while it lives."""
    with started(FIRST):
        also(SECOND)
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), ValueError("x"), CheckpointError("y")]
)
def test_what_rank_0_fails_at_all_ranks_raise(ranks2: RankPool, error: Exception) -> None:
    assert ranks2.run(fail_on_first, error) == [(type(error), str(error))] * 2


def fail_on_first(error: Exception) -> tuple[type, str]:
    def act() -> None:
        raise error

    try:
        world().first(act)
    except (OSError, ValueError, RuntimeError) as found:
        return type(found), str(found)
    raise AssertionError("no error")


def test_what_rank_0_finds_all_ranks_have(ranks2: RankPool) -> None:
    assert ranks2.run(find) == [
        ("of rank 0", "of rank 0", True, False),
        ("of rank 0", "of rank 1", True, False),
    ]


def find() -> tuple[str, str, bool, bool]:
    """Of `first`, of `each`, and whether any rank is the second, or the third."""
    group = world()

    def own() -> str:
        return f"of rank {group.rank}"

    second, third = (group.any(torch.tensor(float(group.rank == rank))) for rank in (1, 2))
    return group.first(own), group.each(own), second, third


def world() -> Group:
    return Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size())
