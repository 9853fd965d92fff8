"""Plans for random rollout batches: nothing lost, nothing doubled, everything within its limits."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_troll.batching.plan import Capacity, UpdatePlan, UpdateSchedule, plan


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], list[int], UpdateSchedule, Capacity]:
    samples, per_epoch, epochs = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    n_groups = draw(st.integers(per_epoch, 12))
    groups = [g for g in range(n_groups) for _ in range(samples)]
    lengths = draw(st.lists(st.integers(1, 60), min_size=len(groups), max_size=len(groups)))
    capacity = Capacity(
        dp=draw(st.integers(1, 4)),
        token_budget=draw(st.integers(1, 200)),
        align=draw(st.sampled_from([1, 4])),
        multiple=draw(st.integers(1, 4)),
        packed=draw(st.booleans()),
    )
    return lengths, groups, UpdateSchedule(per_epoch * epochs, epochs, draw(st.integers(0, 3))), capacity


def padded(length: int, align: int) -> int:
    return (length + align - 1) // align * align


@given(problems())
@settings(max_examples=200, deadline=None)
def test_every_plan_keeps_its_promises(
    problem: tuple[list[int], list[int], UpdateSchedule, Capacity],
) -> None:
    lengths, groups, schedule, capacity = problem
    result = plan(lengths, groups, schedule, capacity)
    assert result == plan(lengths, groups, schedule, capacity)
    assert len(result.steps) == schedule.updates
    each_response_once_an_epoch(result, len(lengths), schedule.epochs)
    for step in result.steps:
        assert step.responses
        taken = {groups[i] for i in step.responses}
        assert step.responses == tuple(i for i, group in enumerate(groups) if group in taken)
        assert len(step.ranks) == capacity.dp
        counts = {len(rank) for rank in step.ranks}
        assert len(counts) == 1
        assert counts.pop() % capacity.multiple == 0
        for micro_batch in (m for rank in step.ranks for m in rank if len(m) > 1):
            costs = [padded(lengths[i], capacity.align) for i in micro_batch]
            size = sum(costs) if capacity.packed else max(costs) * len(costs)
            assert size <= capacity.token_budget
        loads = [sum(padded(lengths[i], capacity.align) for m in rank for i in m) for rank in step.ranks]
        assert max(loads) - min(loads) <= max(padded(lengths[i], capacity.align) for i in step.responses)


def each_response_once_an_epoch(result: UpdatePlan, n: int, epochs: int) -> None:
    for epoch in range(epochs):
        seen = Counter(i for step in result.steps if step.epoch == epoch for i in step.responses)
        assert seen == Counter(range(n))


def test_a_plan_on_one_screen() -> None:
    """Longest first to the emptier rank (12, 4 | 7, 5, 3, 2), then first fit; 12 exceeds the budget alone."""
    lengths, groups = [12, 7, 5, 4, 3, 2], [0, 0, 0, 1, 1, 1]
    (step,) = plan(lengths, groups, UpdateSchedule(1, 1, seed=0), Capacity(dp=2, token_budget=10)).steps
    assert step.ranks == (((0,), (3,)), ((1, 4), (2, 5)))


def test_groups_are_dealt_anew_every_epoch_and_by_seed() -> None:
    lengths, groups = [1] * 32, list(range(32))
    capacity = Capacity(dp=1, token_budget=100)
    first, second = (
        [s.responses for s in plan(lengths, groups, UpdateSchedule(8, 2, seed), capacity).steps]
        for seed in (0, 1)
    )
    assert {len(responses) for responses in first} == {8}
    assert first[:4] != first[4:]
    assert first != second


def test_more_ranks_than_responses_leave_empty_micro_batches() -> None:
    (step,) = plan([5], [0], UpdateSchedule(1, 1, 0), Capacity(dp=3, token_budget=8, multiple=2)).steps
    assert step.ranks == (((0,), ()), ((), ()), ((), ()))


def test_steps_that_cannot_be_filled_are_refused() -> None:
    capacity = Capacity(dp=1, token_budget=8)
    with pytest.raises(ValueError, match="2 prompt groups cannot fill 3 optimizer steps per epoch"):
        plan([1, 1, 1, 1], [0, 0, 1, 1], UpdateSchedule(3, 1, 0), capacity)
    with pytest.raises(ValueError, match=r"train.updates=3 .* multiple of train.epochs=2"):
        plan([1, 1, 1, 1], [0, 1, 2, 3], UpdateSchedule(3, 2, 0), capacity)
