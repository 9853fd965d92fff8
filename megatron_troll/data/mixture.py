"""The order of the prompts of a mixture: whose turn it is, and which prompt it draws."""

import hashlib
import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from megatron_troll.config import Curriculum
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
    """The prompts of one source. name: "" for the only source of the short form; levels: the training
    prompts, those of each level of `curriculum` if there is one."""

    name: str
    weight: float
    levels: tuple[tuple[Prompt, ...], ...]
    held_out: tuple[Prompt, ...]
    curriculum: Curriculum | None = None

    @property
    def train(self) -> tuple[Prompt, ...]:
        """The training prompts of all levels."""
        return tuple(prompt for prompts in self.levels for prompt in prompts)

    @property
    def first_level(self) -> int:
        return 0 if self.curriculum is None else self.curriculum.first


class Stage(NamedTuple):
    """A level, by its place among those of a source, and the prompts that the source had drawn before it."""

    level: int
    since: int


class MixtureOrder:
    """The training prompts of a mixture in the order in which they are drawn. Sources take turns by weight;
    each draws the prompts of its level epoch after epoch, in an order keyed by (seed, its name, the level).
    `position`, the number of prompts drawn so far, is the whole state besides the levels."""

    def __init__(self, sources: Sequence[SourcePrompts], seed: int, shuffle: bool = True) -> None:
        self._sources = sources
        self._turns = Turns([source.weight for source in sources])
        self._orders = [
            [
                PromptOrder(len(prompts), keyed(seed, one.name, level), shuffle)
                for level, prompts in enumerate(one.levels)
            ]
            for one in sources
        ]
        self.position = 0

    def seek(self, position: int) -> None:
        """Continue as if `position` prompts had been drawn."""
        if position < 0:
            raise ValueError(f"a position is a number of prompts, 0 or more, got {position}")
        self.position = position

    def drawn(self, name: str) -> int:
        """The number of prompts that a source has drawn so far."""
        counts = self._turns.counts(self.position)
        return next(count for source, count in zip(self._sources, counts) if source.name == name)

    def next(self, count: int, stages: Mapping[str, Stage]) -> list[Prompt]:
        """Draw the next `count` prompts, each source at its stage (without one: its first level). A prompt
        may occur twice where an epoch of its source ends."""
        turns, drawn = self._turns.next(self.position, count), self._turns.counts(self.position)
        self.position += count
        prompts = []
        for i in turns:
            level, since = stages.get(self._sources[i].name, Stage(0, 0))
            order = self._orders[i][level]
            order.seek(max(0, drawn[i] - since))
            prompts.append(self._sources[i].levels[level][order.next(1)[0]])
            drawn[i] += 1
        return prompts


def keyed(seed: int, name: str, level: int = 0) -> int:
    """A 64-bit seed of its own for each source and level; the first of the short form is `seed` itself."""
    if not name and not level:
        return seed
    words = f"{seed}:{name}" if not level else f"{seed}:{name}:{level}"
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little")


def interleaved(parts: Mapping[str, Sequence[Prompt]]) -> tuple[Prompt, ...]:
    """All prompts of several sources, so mixed that every beginning holds their shares."""
    parts = {name: prompts for name, prompts in parts.items() if prompts}
    if not parts:
        return ()
    each = [iter(prompts) for prompts in parts.values()]
    sizes = [len(prompts) for prompts in parts.values()]
    return tuple(next(each[i]) for i in Turns(sizes).next(0, sum(sizes)))
