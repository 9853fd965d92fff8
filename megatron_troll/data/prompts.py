"""Prompt files: read, deduplicated, checked, and split into training and held-out prompts."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from megatron_troll.config import Data, PromptFiles
from megatron_troll.data.chat import encoded
from megatron_troll.data.rows import DataError, Malformed, Row, read_rows
from megatron_troll.data.schemas import detect, to_prompt
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message, Prompt

Problem = Callable[[Prompt], str | None]
TOGETHER = 1024  # Enough for the tokenizer to keep every core busy.


def no_problem(prompt: Prompt) -> None:
    """Refuse no prompt."""


def split(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, each in the given order. The held-out prompts have the `count` smallest
    hashes of (seed, text), so the choice does not depend on the order. Raises DataError if no training prompt
    is left."""
    if count >= len(prompts):
        raise DataError(f"data.held_out={count} leaves nothing to train on: there are {len(prompts)} prompts")
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


@dataclass
class Counts:
    """Counts of the rows of some files, by how they were handled. `conflicts` are the duplicates whose answer
    differs from that of the first."""

    rows: int = 0
    malformed: int = 0
    duplicates: int = 0
    conflicts: int = 0
    overlong: int = 0
    first_malformed: str = ""

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows"]
        if self.duplicates:
            parts.append(f"{self.duplicates:,} duplicates dropped ({self.conflicts:,} with another answer)")
        if self.malformed:
            parts.append(f"{self.malformed:,} malformed skipped (first: {self.first_malformed})")
        if self.overlong:
            parts.append(f"{self.overlong:,} too long skipped")
        return ", ".join(parts)


@dataclass(frozen=True)
class PromptSet:
    """Training and held-out prompts, disjoint; `counts` holds one entry per group of files read."""

    train: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]
    counts: dict[str, Counts]

    def __str__(self) -> str:
        lines = [f"{len(self.train):,} training prompts, {len(self.held_out):,} held out"]
        return "\n".join(lines + [f"  {name}: {counts}" for name, counts in self.counts.items()])


def load_prompts(config: Data, seed: int, template: ChatTemplate, problem: Problem = no_problem) -> PromptSet:
    """Read the files of `config`. An integer `held_out` is split off by a hash of `seed` and each prompt's
    text, so it does not depend on the order of files or rows. See read_prompts. Raises DataError."""
    prompts, counts = read_prompts(config.files, config, template, "data", problem)
    if isinstance(config.held_out, int):
        train, held_out = split(prompts, config.held_out, seed)
        read = {"files": counts}
    else:
        held_out, held_counts = read_prompts(config.held_out, config, template, "data", problem)
        train, read = prompts, {"files": counts, "held-out files": held_counts}
    check_disjoint(train, held_out)
    return PromptSet(tuple(train), tuple(held_out), read)


def read_prompts(
    files: Sequence[str],
    config: PromptFiles,
    template: ChatTemplate,
    key: str,
    problem: Problem = no_problem,
) -> tuple[list[Prompt], Counts]:
    """The distinct prompts of `files` in file order. A row with the same text as an earlier one is a
    duplicate: it is dropped and counted. Raises DataError for a malformed or too long row, unless `config`
    says to skip it; `key` is the key of `config` in the configuration, for messages. `problem` says why no
    answer to a prompt can be judged, None if it can: such a row is malformed."""
    reader = _Reader(config, key, problem)
    prompts = [prompt for path in files for prompt in reader.prompts(path, template)]
    if not prompts:
        raise DataError(f"{', '.join(files)}: no usable prompt; {reader.counts}")
    return prompts, reader.counts


@dataclass
class _Reader:
    """Reader of prompt files. `answers` (chat -> answer) and `places` (id -> place) hold what it has read."""

    config: PromptFiles
    key: str
    problem: Problem
    schema: str | None = None
    counts: Counts = field(default_factory=Counts)
    answers: dict[tuple[Message, ...], str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def prompts(self, path: str, template: ChatTemplate) -> Iterator[Prompt]:
        """The prompts of a file that are new and not too long; TOGETHER of them are tokenized at a time."""
        self.schema = None if self.config.schema_ == "auto" else self.config.schema_
        fresh: list[tuple[Prompt, Row]] = []
        for row in read_rows(path):
            try:
                prompt = self._read(row)
            except Malformed as error:
                if self.config.malformed == "error":
                    yield from self._fitting(fresh, template)  # Errors of earlier rows come first.
                self._skip_malformed(row, error)
                continue
            if prompt is not None:
                fresh.append((prompt, row))
            if len(fresh) == TOGETHER:
                yield from self._fitting(fresh, template)
                fresh = []
        yield from self._fitting(fresh, template)

    def _read(self, row: Row) -> Prompt | None:
        """The prompt of a row; None for a duplicate. Raises Malformed."""
        self.counts.rows += 1
        if row.problem:
            raise Malformed(row.problem)
        self.schema = self.schema or detect(row.value)
        prompt = to_prompt(self.schema, row.value)
        problem = self.problem(prompt)
        if problem is not None:
            raise Malformed(problem)
        return prompt if self._is_new(prompt, row) else None

    def _is_new(self, prompt: Prompt, row: Row) -> bool:
        chat = prompt.messages
        if chat in self.answers:
            self.counts.duplicates += 1
            self.counts.conflicts += self.answers[chat] != prompt.answer
            return False
        if prompt.id in self.places:
            raise Malformed(f"id {prompt.id!r} already names another prompt ({self.places[prompt.id]})")
        self.answers[chat] = prompt.answer
        self.places[prompt.id] = row.where
        return True

    def _skip_malformed(self, row: Row, error: Malformed) -> None:
        if self.config.malformed == "error":
            raise DataError(
                f"{row.where}: {error} ({self.key}.malformed=skip skips and counts it)"
            ) from error
        self.counts.malformed += 1
        self.counts.first_malformed = self.counts.first_malformed or f"{row.where}: {error}"

    def _fitting(self, fresh: Sequence[tuple[Prompt, Row]], template: ChatTemplate) -> Iterator[Prompt]:
        """The prompts with their ids, without those that are malformed or too long."""
        every = encoded([prompt for prompt, _ in fresh], template, self.config.max_prompt_tokens)
        for (prompt, row), found in zip(fresh, every, strict=True):
            if isinstance(found, Malformed):
                self._skip_malformed(row, found)
            elif isinstance(found, Prompt):
                yield found
            elif self.config.overlong_prompts == "skip":
                self.counts.overlong += 1
            else:
                raise DataError(
                    f"{row.where}: prompt {prompt.id!r:.80} has {found}, over {self.key}."
                    f"max_prompt_tokens={self.config.max_prompt_tokens} ({self.key}.overlong_prompts=skip "
                    "skips and counts it)"
                )
