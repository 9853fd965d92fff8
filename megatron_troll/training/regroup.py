"""Readings of tokens that were made once, in the micro-batches of one epoch, for those of another: every
epoch deals the rollouts anew to steps, ranks and micro-batches."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_troll.batching.held import at_rest
from megatron_troll.mcore.head import Frozen
from megatron_troll.parallel.groups import Group
from megatron_troll.training.reference import ReferenceOutputs
from megatron_troll.types import HeadOutputs, MicroBatch, Probe, TopK

PER_TOKEN = (HeadOutputs, TopK, ReferenceOutputs, Frozen)


class Route:
    """Moves rows between the ranks of a group: each holds those numbered `held` [H], no number twice on any
    ranks, and gets those of the numbers `wanted` [W] that some rank holds. Blocks.

    found  [F] indices of these numbers in `wanted`, ascending
    """

    def __init__(self, held: Tensor, wanted: Tensor, group: Group) -> None:
        self._group, self._sent, places = group, [], []
        numbers, order = held.sort()
        for asked in group.exchange([wanted] * group.size):
            at = torch.searchsorted(numbers, asked)
            hit = torch.zeros_like(asked, dtype=torch.bool)
            inside = at < len(numbers)
            hit[inside] = numbers[at[inside]] == asked[inside]
            self._sent.append(order[at[hit]])
            places.append(hit.nonzero()[:, 0])
        self.found, self._order = torch.cat(group.exchange(places)).sort()

    def __call__(self, rows: Tensor) -> Tensor:
        """[H, ...] -> [F, ...], detached. Blocks."""
        return torch.cat(self._group.exchange([rows[sent] for sent in self._sent]))[self._order]


def regrouped[T: (HeadOutputs, ReferenceOutputs, TopK)](
    batches: Sequence[MicroBatch], readings: Sequence[T], others: Sequence[MicroBatch], group: Group
) -> list[T]:
    """Readings of the tokens of the micro-batches `others`, from those of `batches`, which hold each token
    once over the ranks of `group`. Full rows are those that were read at a few tokens before, wherever they
    are now. Blocks."""
    counts = [len(batch.target) for batch in at_rest(others)]
    held, wanted = ([numbers(batch) for batch in part] for part in (batches, others))
    route = Route(torch.cat(held), torch.cat(wanted), group)
    assert len(route.found) == sum(counts), "a token was never read"
    made = _moved(readings, route, counts)
    probes = [reading.probe for reading in readings if isinstance(reading, HeadOutputs) and reading.probe]
    if not probes:
        return made
    sparse = Route(
        torch.cat([of[probe.rows] for of, probe in zip(held, probes, strict=True)]), torch.cat(wanted), group
    )
    rows, ends = sparse(torch.cat([probe.logp for probe in probes])), torch.tensor(counts).cumsum(0)
    of = torch.searchsorted(ends.to(rows.device), sparse.found, right=True)
    starts = (ends - torch.tensor(counts)).tolist()
    return [
        replace(reading, probe=Probe(sparse.found[of == i] - start, rows[of == i]))
        for i, (reading, start) in enumerate(zip(made, starts, strict=True))
    ]


def numbers(batch: MicroBatch) -> Tensor:
    """[N] int64 that names each token among all of the rollout batch."""
    rollouts = torch.tensor(batch.rollouts, dtype=torch.int64, device=batch.sequence.device)
    return (rollouts[batch.sequence] << 32) + batch.position


def _moved(values: Sequence[Any], route: Route, counts: Sequence[int]) -> list[Any]:
    """One value for each of `counts` tokens, from one of each micro-batch: tensors by rows, the fields of
    records and mappings each by itself; what is not of tokens is the same for all."""
    first = values[0]
    if isinstance(first, Tensor):
        return list(route(torch.cat([*values])).split([*counts]))
    if isinstance(first, PER_TOKEN):
        names = [name for name in vars(first) if name != "probe"]
        moved = {name: _moved([vars(value)[name] for value in values], route, counts) for name in names}
        return [replace(first, **{name: of[i] for name, of in moved.items()}) for i in range(len(counts))]
    if isinstance(first, Mapping):
        moved = {key: _moved([value[key] for value in values], route, counts) for key in first}
        return [{key: of[i] for key, of in moved.items()} for i in range(len(counts))]
    return [first] * len(counts)
