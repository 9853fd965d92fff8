"""Assign responses to optimizer steps, data-parallel ranks and micro-batches: index arithmetic only.

Every rank computes the same plan from the same lengths and seed, so nothing has to be sent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_troll.objectives.aggregation import Aggregation, token_weights
from megatron_troll.types import Rollout

MicroBatchIndices = tuple[int, ...]


@dataclass(frozen=True)
class UpdateSchedule:
    """Schedule for one rollout batch: `updates` optimizer steps in total, over `epochs` passes."""

    updates: int
    epochs: int
    seed: int


@dataclass(frozen=True)
class Capacity:
    """Limits within which a step is planned.

    dp             data-parallel ranks (context-parallel ranks not counted)
    token_budget   padded tokens of one micro-batch, over all context-parallel ranks
    align          padded sequence lengths are multiples of this
    multiple       a step's number of micro-batches is a multiple of this (interleaved pipeline: its stages)
    packed         sequences one after the other; otherwise each is padded to the longest of its micro-batch
    """

    dp: int
    token_budget: int
    align: int = 1
    multiple: int = 1
    packed: bool = True


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step. ranks[d][m] are the responses of micro-batch m on data-parallel rank d; every rank
    has the same number of micro-batches, some of which may be empty."""

    epoch: int
    ranks: tuple[tuple[MicroBatchIndices, ...], ...]

    @property
    def responses(self) -> tuple[int, ...]:
        """Every response of the step, ascending."""
        return tuple(sorted(i for rank in self.ranks for micro_batch in rank for i in micro_batch))


@dataclass(frozen=True)
class UpdatePlan:
    """The optimizer steps of one rollout batch, in order."""

    steps: tuple[PlannedStep, ...]


def plan(
    lengths: Sequence[int], groups: Sequence[int], schedule: UpdateSchedule, capacity: Capacity
) -> UpdatePlan:
    """Assign each response i, of `lengths[i]` tokens and prompt group `groups[i]`.

    Each epoch shuffles the groups again and distributes them over its steps; a group's responses stay in one
    step. Within a step the responses are balanced over ranks and packed into micro-batches, longest first;
    one that is longer than the budget has a micro-batch of its own. Raises ValueError if a step would have no
    group.
    """
    per_epoch = _steps_per_epoch(schedule, len(set(groups)))
    costs = [-(-max(length, 1) // capacity.align) * capacity.align for length in lengths]
    steps = []
    for epoch in range(schedule.epochs):
        for chosen in _deal(groups, per_epoch, seed=(schedule.seed, epoch)):
            longest_first = sorted(chosen, key=lambda i: (-costs[i], i))
            steps.append(PlannedStep(epoch, _arrange(longest_first, costs, capacity)))
    return UpdatePlan(tuple(steps))


def _steps_per_epoch(schedule: UpdateSchedule, n_groups: int) -> int:
    per_epoch, rest = divmod(schedule.updates, schedule.epochs)
    if rest:
        raise ValueError(
            f"train.updates={schedule.updates} is over all epochs and must be a multiple of "
            f"train.epochs={schedule.epochs}"
        )
    if n_groups < per_epoch:
        raise ValueError(
            f"{n_groups} prompt groups cannot fill {per_epoch} optimizer steps per epoch: "
            f"lower train.updates or raise rollout.prompts"
        )
    return per_epoch


def _deal(groups: Sequence[int], steps: int, seed: tuple[int, int]) -> list[list[int]]:
    """Responses of each step: the groups, shuffled and split into parts whose sizes differ by at most 1."""
    order = np.random.default_rng(seed).permutation(np.unique(groups))
    step_of = {int(group): step for step, part in enumerate(np.array_split(order, steps)) for group in part}
    dealt: list[list[int]] = [[] for _ in range(steps)]
    for i, group in enumerate(groups):
        dealt[step_of[group]].append(i)
    return dealt


def _arrange(
    longest_first: Sequence[int], costs: Sequence[int], capacity: Capacity
) -> tuple[tuple[MicroBatchIndices, ...], ...]:
    ranks = [_fill(rank, costs, capacity) for rank in _balance(longest_first, costs, capacity.dp)]
    most = max(1, *(len(rank) for rank in ranks))
    count = -(-most // capacity.multiple) * capacity.multiple
    return tuple(tuple(rank) + ((),) * (count - len(rank)) for rank in ranks)


def _balance(longest_first: Sequence[int], costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Assign each response to the rank with the fewest tokens so far, on a tie to the lowest rank. The
    fullest rank then exceeds that of the best assignment by at most a third (Graham 1969)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for i in longest_first:
        rank = loads.index(min(loads))
        shares[rank].append(i)
        loads[rank] += costs[i]
    return shares


def _fill(longest_first: Sequence[int], costs: Sequence[int], capacity: Capacity) -> list[MicroBatchIndices]:
    """First fit: each response goes to the first micro-batch with room, or opens one."""
    filled: list[list[int]] = []
    sizes: list[int] = []
    for i in longest_first:
        # If not packed, each sequence costs as much as the first, the longest of its micro-batch.
        adds = [costs[i] if capacity.packed else costs[members[0]] for members in filled]
        fits = (m for m, size in enumerate(sizes) if size + adds[m] <= capacity.token_budget)
        m = next(fits, None)
        if m is None:
            filled.append([i])
            sizes.append(costs[i])
        else:
            filled[m].append(i)
            sizes[m] += adds[m]
    return [tuple(members) for members in filled]


def step_weights(
    rollouts: Sequence[Rollout], responses: Sequence[int], aggregation: Aggregation, l_max: int | None
) -> list[float]:
    """The weight of each loss token of each rollout, one number per rollout of the whole batch.

    `responses` are the rollouts of the step on all ranks: normalisation is global (ALGORITHMS 0). Rollouts of
    other steps have weight 0. One whose mask is 0 everywhere counts as an empty response.
    """
    lengths = [int(rollouts[i].mask.sum()) for i in responses]
    weights = [0.0] * len(rollouts)
    for i, weight in zip(responses, token_weights(lengths, aggregation, l_max)):
        weights[i] = weight
    return weights


def zigzag(length: int, size: int, rank: int) -> Tensor:
    """Positions [length / size] that context-parallel rank `rank` of `size` holds, ascending: chunks `rank`
    and `2 size - 1 - rank` of 2 size, which balances causal attention. All positions if size is 1.

    `length` must be a multiple of 2 size if size > 1.
    """
    if size == 1:
        return torch.arange(length)
    if length % (2 * size):
        raise ValueError(f"a sequence of {length} tokens cannot be cut into {2 * size} equal chunks")
    chunks = torch.arange(length).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])
