"""Each rank gets the records of what it trains on, and no other; rank 0 has them all."""

from unittest.mock import patch

import numpy as np
import torch.distributed as dist

from megatron_troll.config import Layout
from megatron_troll.mcore import parallel
from megatron_troll.parallel.groups import Group, HostGroups
from megatron_troll.rollout.engine import Completion
from megatron_troll.rollout.records import on_rank_0, share_records
from megatron_troll.types import Message, Prompt, Rollout, marked
from tests.dist.harness import RankPool
from tests.dist.tiny import started
from tests.unit.rollout.answers import PROMPT, answer, assert_arrays

ANSWERS = [answer(length) for length in (5, 2, 0, 7, 3, 1)]
LAYOUTS = (Layout(tp=2), Layout(pp=2), Layout(cp=2), Layout(), Layout(tp=2, pp=2))


def test_all_answers_are_everywhere_and_their_records_on_rank_0(ranks4: RankPool) -> None:
    for ranks in ranks4.run(gather):
        assert ranks == [True] * len(LAYOUTS)


def gather() -> list[bool]:
    """Whether the answers came together, with records on rank 0 only, on each layout."""
    return [_gathered(layout) for layout in LAYOUTS]


def _gathered(layout: Layout) -> bool:
    with started(layout) as groups:
        dp = groups.dp
        share = ANSWERS[len(ANSWERS) * dp.rank // dp.size : len(ANSWERS) * (dp.rank + 1) // dp.size]
        every = on_rank_0(share if groups.is_last_stage else [], groups, recorded=True)
        for one, other in zip(ANSWERS, every, strict=True):
            assert_arrays(one.ids, other.ids)
            assert_arrays(one.logp, other.logp)
            assert_arrays(one.versions, other.versions)
            assert (other.topk is None) == (other.experts is None) == (groups.world.rank > 0)
            if groups.world.rank == 0:
                assert_record(one, other)
        return True


def assert_record(one: Completion, other: Completion | Rollout) -> None:
    assert one.topk is not None
    assert other.topk is not None
    assert one.experts is not None
    assert other.experts is not None
    assert_arrays(one.topk.ids, other.topk.ids)
    assert_arrays(one.topk.logp, other.topk.logp)
    assert_arrays(one.experts, other.experts)


def rollout(one: Completion, elsewhere: bool) -> Rollout:
    record = {} if elsewhere else {"topk": one.topk, "experts": one.experts}
    return Rollout(
        **{"topk": None} | record,
        prompt=Prompt("p", (Message("user", "?"),), ""),
        group=0,
        sample=0,
        prompt_ids=np.arange(PROMPT, dtype=np.int32),
        response_ids=one.ids,
        marks=marked(np.ones(len(one.ids)), one.versions),
        logp=one.logp,
        key=0,
        text="",
        finish=one.finish,
        temperature=1.0,
        elsewhere=elsewhere,
    )


def test_a_rank_receives_the_records_of_its_share(ranks4: RankPool) -> None:
    for rank, held in enumerate(ranks4.run(share)):
        for layout, (mine, found) in zip(LAYOUTS, held, strict=True):
            assert found == ([*range(len(ANSWERS))] if rank == 0 else mine), (rank, layout)


def share() -> list[tuple[list[int], list[int]]]:
    """(the share of this rank, the rollouts whose records it holds), on each layout."""
    return [_shared(layout) for layout in LAYOUTS]


def _shared(layout: Layout) -> tuple[list[int], list[int]]:
    with started(layout) as groups:
        rollouts = [rollout(one, groups.world.rank > 0) for one in ANSWERS]
        mine = [*range(groups.dp.rank, len(ANSWERS), groups.dp.size)]
        there = share_records(rollouts, mine, groups)
        held = [i for i, one in enumerate(there) if not one.elsewhere]
        for i in held:
            assert_record(ANSWERS[i], there[i])
        assert share_records(there, [], groups)[0].group == 0
        return mine, held


def test_objects_and_arrays_go_over_gloo_beside_another_backend(ranks4: RankPool) -> None:
    assert ranks4.run(beside) == [
        ([0, 1], "of 0", [3.0]), ([0, 1], "of 0", [3.0]), ([2, 3], "of 2", [7.0]), ([2, 3], "of 2", [7.0]),
    ]  # fmt: skip


def beside() -> tuple[list[int], str, list[float]]:
    """The ranks of the gloo group beside a pair's group, if that were NCCL's; an object; a sum of arrays."""
    hosts = HostGroups(parallel.COLLECTIVE_TIMEOUT)
    with started(Layout(tp=2)) as groups:
        assert groups.tp.host is None
        handle = groups.tp.handle
        with patch("megatron_troll.parallel.groups.dist.get_backend", return_value="nccl"):
            host = hosts.beside(handle)
            assert hosts.beside(handle) is host
        assert host is not None
        group = Group(handle, groups.tp.rank, groups.tp.size, host)
        name = group.broadcast_object(f"of {groups.world.rank}", 0)
        total = group.sum_arrays(np.array([groups.world.rank + 1.0]))
        group.barrier()
        ranks = dist.get_process_group_ranks(host)
        hosts.leave()
        return ranks, name, total.tolist()
