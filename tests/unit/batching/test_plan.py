"""Plans for random rollout batches: nothing lost, nothing doubled, everything within its limits."""

from collections import Counter

import numpy as np
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


@given(problems(), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_plans_that_share_prefixes_keep_theirs(
    problem: tuple[list[int], list[int], UpdateSchedule, Capacity], prompt: int
) -> None:
    own, groups, schedule, capacity = problem
    shared = [prompt * (group % 3) for group in groups]
    lengths = [prefix + length for prefix, length in zip(shared, own)]
    result = plan(lengths, groups, schedule, capacity, shared)
    assert result == plan(lengths, groups, schedule, capacity, shared)
    each_response_once_an_epoch(result, len(lengths), schedule.epochs)

    def cost(responses: tuple[int, ...]) -> int:
        prefixes = {groups[i]: padded(shared[i], capacity.align) for i in responses if shared[i]}
        return sum(prefixes.values()) + sum(padded(lengths[i] - shared[i], capacity.align) for i in responses)

    for step in result.steps:
        counts = {len(rank) for rank in step.ranks}
        assert len(counts) == 1
        assert counts.pop() % capacity.multiple == 0
        for rank in step.ranks:
            for micro_batch in rank:
                assert cost(micro_batch) <= capacity.token_budget or len(micro_batch) == 1
        # A prefix is read twice only where a rank or a budget ends.
        ranks = [{groups[i] for m in rank for i in m if shared[i]} for rank in step.ranks]
        assert sum(map(len, ranks)) < len({groups[i] for i in step.responses}) + capacity.dp


def test_groups_stay_whole_and_ranks_balanced() -> None:
    """16 prompts of 60 to 100 tokens, 16 responses of 8 to 128 each, on 8 ranks."""
    rng = np.random.default_rng(0)
    shared = rng.integers(60, 101, 16).repeat(16).tolist()
    lengths = [prefix + int(length) for prefix, length in zip(shared, rng.integers(8, 129, 256))]
    groups = [i // 16 for i in range(256)]
    (step,) = plan(lengths, groups, UpdateSchedule(1, 1, 0), Capacity(dp=8, token_budget=4096), shared).steps
    sizes = []
    read = 0
    for rank in step.ranks:
        prefixes = sum(shared[16 * group] for m in rank for group in {groups[i] for i in m})
        sizes.append(prefixes + sum(lengths[i] - shared[i] for m in rank for i in m))
        read += prefixes
    once = sum(shared[::16])
    assert (sum(shared) - read) / (sum(shared) - once) > 0.9
    assert max(sizes) < 1.1 * sum(sizes) / 8


def test_a_budget_cuts_a_group_into_as_few_as_fit() -> None:
    capacity = Capacity(dp=1, token_budget=30)
    (step,) = plan([20, 20, 20, 20, 20], [0] * 5, UpdateSchedule(1, 1, 0), capacity, [10] * 5).steps
    assert step.ranks == (((0, 1), (2, 3), (4,)),)


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
