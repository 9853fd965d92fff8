"""The order of the prompts of a mixture: whose turn it is, and which prompt it draws."""

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from megatron_troll.data.order import PromptOrder
from megatron_troll.types import Prompt


class Turns:
    """Turns of several members by weight: the k-th turn (from 0) of a member of weight w has the time
    (2k + 1) / 2w, and turns are taken in the order of their times (Webster's method of apportionment), equal
    ones in the order of the members. After n turns every member has had about its share of n, and no history
    is needed to know how many. Weights are above 0."""

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = [Fraction(weight) for weight in weights]

    def counts(self, turns: int) -> list[int]:
        """The number of the first `turns` turns that each member has had."""
        time = Fraction(turns) / sum(self._weights)
        counts = [max(0, -((1 - 2 * time * weight) // 2)) for weight in self._weights]  # turns before `time`
        members = range(len(counts))
        while sum(counts) < turns:
            counts[min(members, key=lambda i: self._time(i, counts[i]))] += 1
        while sum(counts) > turns:
            taken = [i for i in members if counts[i]]
            counts[max(taken, key=lambda i: self._time(i, counts[i] - 1))] -= 1
        return counts

    def next(self, turns: int, count: int) -> list[int]:
        """The members whose turns follow the first `turns`."""
        done, drawn = self.counts(turns), []
        waiting = [self._time(i, done[i]) for i in range(len(done))]
        heapq.heapify(waiting)
        for _ in range(count):
            _, i = waiting[0]
            drawn.append(i)
            done[i] += 1
            heapq.heapreplace(waiting, self._time(i, done[i]))
        return drawn

    def _time(self, member: int, turn: int) -> tuple[Fraction, int]:
        return Fraction(2 * turn + 1) / (2 * self._weights[member]), member


@dataclass(frozen=True)
class SourcePrompts:
    """The prompts of one source. name: "" for the only source of the short form."""

    name: str
    weight: float
    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]


class MixtureOrder:
    """The training prompts of a mixture in the order in which they are drawn. Sources take turns by weight;
    each draws its own prompts epoch after epoch, in an order keyed by (seed, its name). `position`, the
    number of prompts drawn so far, is the whole state."""

    def __init__(self, sources: Sequence[SourcePrompts], seed: int, shuffle: bool = True) -> None:
        self._sources = sources
        self._turns = Turns([source.weight for source in sources])
        self._orders = [PromptOrder(len(one.train), keyed(seed, one.name), shuffle) for one in sources]
        self.position = 0

    def seek(self, position: int) -> None:
        """Continue as if `position` prompts had been drawn."""
        if position < 0:
            raise ValueError(f"a position is a number of prompts, 0 or more, got {position}")
        self.position = position

    def next(self, count: int) -> list[Prompt]:
        """Draw the next `count` prompts; a prompt may occur twice where an epoch of its source ends."""
        for order, drawn in zip(self._orders, self._turns.counts(self.position)):
            order.seek(drawn)
        turns = self._turns.next(self.position, count)
        self.position += count
        return [self._sources[i].train[self._orders[i].next(1)[0]] for i in turns]


def keyed(seed: int, name: str) -> int:
    """A 64-bit seed of its own for each source; that of the short form is `seed` itself."""
    if not name:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")


def interleaved(parts: Mapping[str, Sequence[Prompt]]) -> tuple[Prompt, ...]:
    """All prompts of several sources, so mixed that every beginning holds their shares."""
    parts = {name: prompts for name, prompts in parts.items() if prompts}
    if not parts:
        return ()
    each = [iter(prompts) for prompts in parts.values()]
    sizes = [len(prompts) for prompts in parts.values()]
    return tuple(next(each[i]) for i in Turns(sizes).next(0, sum(sizes)))
