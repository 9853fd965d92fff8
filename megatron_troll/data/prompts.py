"""The prompts of a run: its sources read, and split into training and held-out prompts."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron_troll.config import Data, Source
from megatron_troll.data.gym.tasks import Tasks, Wanted, make
from megatron_troll.data.mixture import SourcePrompts, Turns, interleaved
from megatron_troll.data.reader import Counts, Problem, Reader, Seen, instruction_of, no_problem
from megatron_troll.data.rows import DataError
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message, Prompt


def split(prompts: Sequence[Prompt], count: int, seed: int, key: str) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, each in the given order. The held-out prompts have the `count` smallest
    hashes of (seed, text), so the choice does not depend on the order. Raises DataError, which names `key`,
    if no training prompt is left."""
    if count >= len(prompts):
        raise DataError(f"{key}={count} leaves nothing to train on: there are {len(prompts)} prompts")
    ranks = sorted(range(len(prompts)), key=lambda index: _draw(prompts[index], seed))
    held = set(ranks[:count])
    return (
        [prompt for index, prompt in enumerate(prompts) if index not in held],
        [prompt for index, prompt in enumerate(prompts) if index in held],
    )


def check_disjoint(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Raise DataError naming a prompt that is in both sets, by text or by id."""
    chats = {prompt.messages: prompt.id for prompt in train}
    ids = {prompt.id for prompt in train}
    for prompt in held_out:
        twin = chats.get(prompt.messages, prompt.id if prompt.id in ids else None)
        if twin is not None:
            raise DataError(
                f"held-out prompt {prompt.id!r} is also the training prompt {twin!r}: "
                f"{prompt.messages[-1].content!r:.80}"
            )


def _draw(prompt: Prompt, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{prompt.text_key}".encode(), digest_size=16).digest()


@dataclass(frozen=True)
class PromptSet:
    """The sources of a run, in the order of their names; their training and held-out prompts are disjoint.
    `counts` holds one entry per group of rows read."""

    sources: tuple[SourcePrompts, ...]
    counts: dict[str, Counts]

    @cached_property
    def train(self) -> tuple[Prompt, ...]:
        """The training prompts, source after source."""
        return tuple(prompt for source in self.sources for prompt in source.train)

    @cached_property
    def held_out(self) -> tuple[Prompt, ...]:
        """The held-out prompts, so mixed that every beginning holds the shares of the sources."""
        return interleaved({source.name: source.held_out for source in self.sources})

    def __str__(self) -> str:
        lines = [f"{len(self.train):,} training prompts, {len(self.held_out):,} held out"]
        return "\n".join(lines + [f"  {name}: {counts}" for name, counts in self.counts.items()])


def load_prompts(config: Data, seed: int, template: ChatTemplate, problem: Problem = no_problem) -> PromptSet:
    """Read the sources of `config`, and make its tasks. A number of held-out prompts is split off from files
    by a hash of `seed` and each prompt's text, so it does not depend on the order of files or rows; held-out
    tasks are made from other seeds, and none of them is among the training prompts. See Reader. Raises
    DataError, and ConfigError for tasks that cannot be made."""
    return _Loading(config, seed, template, problem).all()


@dataclass
class _Loading:
    """The reading of every source."""

    config: Data
    seed: int
    template: ChatTemplate
    problem: Problem
    counts: dict[str, Counts] = field(default_factory=dict)
    train: Seen = field(default_factory=Seen)
    held_out: Seen = field(default_factory=Seen)

    def all(self) -> PromptSet:
        wanted, sources = held_out_by_source(self.config), self.config.mixture
        made = make(
            {
                name: Wanted(f"data.sources.{name}.gym" if name else "data.gym", source.gym, True, count)
                for name, source in sources.items()
                if source.gym is not None and isinstance(count := wanted[name], int)
            }
        )
        files = {
            name: self._files(name, source, wanted[name])
            for name, source in sources.items()
            if name not in made
        }
        held = {name: out for name, (_, out) in files.items()}
        held |= {name: self._held_tasks(name, sources[name], tasks) for name, tasks in made.items()}
        # Tasks come last: they leave out what is held out of any source.
        excluded = {prompt.messages for prompts in held.values() for prompt in prompts}
        levels = {name: [train] for name, (train, _) in files.items()}
        levels |= {name: self._tasks(name, sources[name], tasks, excluded) for name, tasks in made.items()}
        read = tuple(
            SourcePrompts(
                name,
                source.weight,
                tuple(map(tuple, levels[name])),
                tuple(held[name]),
                None if source.gym is None else source.gym.curriculum,
            )
            for name, source in sources.items()
        )
        loaded = PromptSet(read, self.counts)
        check_disjoint(loaded.train, loaded.held_out)
        return loaded

    def _held_tasks(self, name: str, source: Source, tasks: Tasks) -> list[Prompt]:
        if not tasks.held_out:
            return []
        reader = self._reader(name, source, self.held_out, "held-out tasks")
        return reader.tasks(tasks.held_out, tasks.to_prompt)

    def _tasks(
        self, name: str, source: Source, tasks: Tasks, excluded: set[tuple[Message, ...]]
    ) -> list[list[Prompt]]:
        """The training prompts of each level."""
        levels = []
        for rows in tasks.train:
            level = rows[0].value["level"]
            reader = self._reader(
                name, source, self.train, "tasks" if level is None else f"tasks of level {level}"
            )
            reader.excluded = excluded
            levels.append(reader.tasks(rows, tasks.to_prompt))
        return levels

    def _files(
        self, name: str, source: Source, wanted: int | tuple[str, ...]
    ) -> tuple[list[Prompt], list[Prompt]]:
        """(training, held-out) prompts."""
        prompts = self._reader(name, source, self.train, "files").files(source.files or (), source)
        if isinstance(wanted, int):
            return split(prompts, wanted, self.seed, f"data.held_out.{name}" if name else "data.held_out")
        held_out = self._reader(name, source, self.held_out, "held-out files").files(wanted, source)
        return prompts, held_out

    def _reader(self, name: str, source: Source, seen: Seen, words: str) -> Reader:
        made = Reader(
            self.config,
            "data",
            self.template,
            self.problem,
            name,
            instruction_of(source),
            source.system,
            seen,
        )
        self.counts[f"{name}, {words}" if name else words] = made.counts
        return made


def held_out_by_source(config: Data) -> Mapping[str, int | tuple[str, ...]]:
    """The number of held-out prompts of each source, or their files. A number for several sources is shared
    out by their weights."""
    sources, held_out = config.mixture, config.held_out
    if isinstance(held_out, dict):
        return {name: held_out.get(name, 0) for name in sources}
    if isinstance(held_out, tuple):
        return dict.fromkeys(sources, held_out)
    shares = Turns([source.weight for source in sources.values()]).counts(held_out)
    return dict(zip(sources, shares))
