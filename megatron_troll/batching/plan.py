"""Assign responses to optimizer steps, data-parallel ranks and micro-batches: index arithmetic only.

Every rank computes the same plan from the same lengths and seed, so nothing has to be sent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_troll.objectives.aggregation import Aggregation, token_weights
from megatron_troll.types import Rollout

MicroBatchIndices = tuple[int, ...]
# How far, of its share of the tokens, a rank may be from it to leave a group whole.
SLACK = 0.05


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
    lengths: Sequence[int],
    groups: Sequence[int],
    schedule: UpdateSchedule,
    capacity: Capacity,
    shared: Sequence[int] | None = None,
) -> UpdatePlan:
    """Assign each response i, of `lengths[i]` tokens and prompt group `groups[i]`.

    Each epoch shuffles the groups again and distributes them over its steps; a group's responses stay in one
    step. Within a step the responses are balanced over ranks and packed into micro-batches, longest first;
    one that is longer than the budget has a micro-batch of its own. Raises ValueError if a step would have no
    group.

    `shared`: a micro-batch reads the first shared[i] tokens of response i once for all of its group. Then
    groups stay whole where ranks stay balanced, and in a micro-batch where the budget admits it.
    """
    per_epoch = _steps_per_epoch(schedule, len(set(groups)))
    steps = []
    for epoch in range(schedule.epochs):
        for chosen in _deal(groups, per_epoch, seed=(schedule.seed, epoch)):
            if shared is None:
                costs = [_padded(length, capacity) for length in lengths]
                longest_first = sorted(chosen, key=lambda i: (-costs[i], i))
                filled = [
                    _fill(rank, costs, capacity) for rank in _balance(longest_first, costs, capacity.dp)
                ]
            else:
                parts = _parts(chosen, lengths, groups, shared, capacity)
                filled = [_fill_parts(rank, capacity) for rank in _balance_parts(parts, capacity.dp)]
            steps.append(PlannedStep(epoch, _evened(filled, capacity)))
    return UpdatePlan(tuple(steps))


def _padded(length: int, capacity: Capacity) -> int:
    return -(-max(length, 1) // capacity.align) * capacity.align


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


def _evened(
    ranks: Sequence[Sequence[MicroBatchIndices]], capacity: Capacity
) -> tuple[tuple[MicroBatchIndices, ...], ...]:
    """The micro-batches of each rank, with empty ones until every rank has the same, allowed number."""
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


@dataclass(frozen=True)
class _Part:
    """Responses of one group, `own` tokens of each behind a prefix of `prefix` tokens that is read once."""

    prefix: int
    responses: tuple[int, ...]
    own: tuple[int, ...]

    @property
    def cost(self) -> int:
        return self.prefix + sum(self.own)

    def cut(self, at: int) -> tuple["_Part", "_Part"]:
        """The first `at` responses, and the others."""
        return (
            _Part(self.prefix, self.responses[:at], self.own[:at]),
            _Part(self.prefix, self.responses[at:], self.own[at:]),
        )

    def fitting(self, room: float) -> int:
        """Number of the first responses that cost at most `room` with their prefix."""
        costs = self.prefix + np.cumsum(self.own)
        return int(np.searchsorted(costs, room, side="right"))


def _parts(
    chosen: Sequence[int],
    lengths: Sequence[int],
    groups: Sequence[int],
    shared: Sequence[int],
    capacity: Capacity,
) -> list[_Part]:
    """The responses that share a prefix, the largest part first; one that shares none is a part."""
    members: dict[tuple[int, int], list[int]] = {}
    for i in chosen:
        members.setdefault((groups[i], shared[i]) if shared[i] else (-1, i), []).append(i)
    parts = []
    for (_, prefix), responses in members.items():
        alone = not shared[responses[0]]
        own = tuple(_padded(lengths[i] - (0 if alone else prefix), capacity) for i in responses)
        parts.append(_Part(0 if alone else _padded(prefix, capacity), tuple(responses), own))
    return sorted(parts, key=lambda part: (-part.cost, part.responses))


def _balance_parts(parts: Sequence[_Part], ranks: int) -> list[list[_Part]]:
    """Deal the parts, in a row, to the ranks, with the smallest share for which the ranks suffice. A part is
    cut where a rank's share ends within it, unless it exceeds the share by less than SLACK: at most
    `ranks` - 1 prefixes are read twice."""
    low, high = 0, sum(part.cost for part in parts)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_dealt(parts, middle)) <= ranks else (middle, high)
    shares = _dealt(parts, high)
    return shares + [[]] * (ranks - len(shares))


def _dealt(parts: Sequence[_Part], share: int) -> list[list[_Part]]:
    """The parts in a row, in shares of at most `share` tokens and SLACK, or of one response."""
    shares: list[list[_Part]] = [[]]
    room = share
    for part in parts:
        rest = part
        while rest.cost > room + SLACK * share:
            at = rest.fitting(room)
            if at == 0 and not shares[-1]:
                at = 1
            if at:
                first, rest = rest.cut(at)
                shares[-1].append(first)
            if not rest.responses:
                break
            shares.append([])
            room = share
        if rest.responses:
            shares[-1].append(rest)
            room -= rest.cost
    return shares


def _fill_parts(parts: Sequence[_Part], capacity: Capacity) -> list[MicroBatchIndices]:
    """First fit of whole parts, the largest first; one larger than the budget is cut into as few as fit."""
    filled: list[list[int]] = []
    sizes: list[int] = []
    pieces = [piece for part in parts for piece in _within(part, capacity)]
    for part in sorted(pieces, key=lambda piece: -piece.cost):
        fits = (m for m, size in enumerate(sizes) if size + part.cost <= capacity.token_budget)
        m = next(fits, None)
        if m is None:
            filled.append([*part.responses])
            sizes.append(part.cost)
        else:
            filled[m] += part.responses
            sizes[m] += part.cost
    return [tuple(members) for members in filled]


def _within(part: _Part, capacity: Capacity) -> Iterator[_Part]:
    """The part in pieces of at most the budget, or of one response."""
    while len(part.responses) > 1 and part.cost > capacity.token_budget:
        first, part = part.cut(max(1, part.fitting(capacity.token_budget)))
        yield first
    yield part


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
