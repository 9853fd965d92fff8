"""A second layout on the ranks of the first leaves the first as it is; layouts that end leave nothing."""

import os
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_troll.config.tree import Layout
from megatron_troll.mcore.parallel import also, inside
from megatron_troll.parallel.groups import Groups
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
