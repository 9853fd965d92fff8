"""Rows to prompts: read, deduplicated, checked, and counted."""

from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace

from megatron_troll.config import Origin, Reading
from megatron_troll.data.chat import encoded
from megatron_troll.data.conversion import Conversion, LeftOut
from megatron_troll.data.gym.tasks import ASKED
from megatron_troll.data.rows import DataError, Malformed, Row, read_rows
from megatron_troll.data.template import ChatTemplate
from megatron_troll.types import Message, Prompt

Problem = Callable[[Prompt], str | None]
Converter = Callable[[Row], Prompt]
QUESTION = "{question}"
TOGETHER = 1024  # Enough for the tokenizer to keep every core busy.


def no_problem(prompt: Prompt) -> None:
    """Refuse no prompt."""


def instructed(question: str, instruction: str) -> str:
    """The text of a turn with an instruction: where that says {question}, otherwise after a blank line."""
    if QUESTION in instruction:
        return instruction.replace(QUESTION, question)
    return f"{question}\n\n{instruction}"


def instruction_of(origin: Origin) -> str | None:
    """The instruction of a source; for tasks, by default, the form of the answer that their scorer reads."""
    return ASKED if origin.instruction is None and origin.gym is not None else origin.instruction


@dataclass
class Counts:
    """Counts of the rows of a source, by how they were handled. `conflicts` are the duplicates whose answer
    differs from that of the first, `left_out` the rows that `where` left out."""

    rows: int = 0
    left_out: int = 0
    malformed: int = 0
    duplicates: int = 0
    conflicts: int = 0
    overlong: int = 0
    held_out: int = 0
    first_left_out: str = ""
    first_malformed: str = ""

    def __str__(self) -> str:
        parts = [f"{self.rows:,} rows"]
        if self.left_out:
            parts.append(f"{self.left_out:,} left out by `where` (first: {self.first_left_out})")
        if self.duplicates:
            parts.append(f"{self.duplicates:,} duplicates dropped ({self.conflicts:,} with another answer)")
        if self.held_out:
            parts.append(f"{self.held_out:,} left out, because they are held out")
        if self.malformed:
            parts.append(f"{self.malformed:,} malformed skipped (first: {self.first_malformed})")
        if self.overlong:
            parts.append(f"{self.overlong:,} too long skipped")
        return ", ".join(parts)


@dataclass
class Seen:
    """The prompts read of a mixture so far: chat -> answer, and id -> place."""

    answers: dict[tuple[Message, ...], str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)


@dataclass
class Reader:
    """Reader of one source. limits: the handling of bad rows, `key` its place in the configuration; problem:
    says why no answer to a prompt can be judged, None if it can; seen: shared by the sources of a mixture;
    excluded: chats that are left out and counted."""

    limits: Reading
    key: str
    template: ChatTemplate
    problem: Problem = no_problem
    source: str = ""
    instruction: str | None = None
    system: str | None = None
    seen: Seen = field(default_factory=Seen)
    excluded: Set[tuple[Message, ...]] = frozenset()
    counts: Counts = field(default_factory=Counts)

    def files(self, paths: Sequence[str], origin: Origin) -> list[Prompt]:
        """The distinct prompts of files in their order, read as `origin` says. A row with the same text as an
        earlier one is a duplicate: it is dropped and counted. Raises DataError for a malformed or too long
        row, unless `limits` says to skip it, and if no prompt is left."""
        convert = Conversion(origin, self._place)
        return self._some((one for path in paths for one in self._file(path, convert)), ", ".join(paths))

    def tasks(self, rows: Iterable[Row], convert: Converter) -> list[Prompt]:
        """The distinct prompts of rows that were made for this source, under the same conditions."""
        return self._some(self._prompts(rows, convert), f"{self._place}.gym")

    @property
    def _place(self) -> str:
        """The place of the source in the configuration."""
        return f"{self.key}.sources.{self.source}" if self.source else self.key

    def _some(self, prompts: Iterable[Prompt], of: str) -> list[Prompt]:
        found = list(prompts)
        if not found:
            raise DataError(f"{of}: no usable prompt; {self.counts}")
        return found

    def _file(self, path: str, convert: Conversion) -> Iterator[Prompt]:
        convert.begin()
        return self._prompts(read_rows(path), convert)

    def _prompts(self, rows: Iterable[Row], convert: Converter) -> Iterator[Prompt]:
        """The prompts of rows that are new and not too long; TOGETHER of them are tokenized at a time."""
        fresh: list[tuple[Prompt, Row]] = []
        for row in rows:
            try:
                prompt = self._read(row, convert)
            except Malformed as error:
                if self.limits.malformed == "error":
                    yield from self._fitting(fresh)  # Errors of earlier rows come first.
                self._skip_malformed(row, error)
                continue
            if prompt is not None:
                fresh.append((prompt, row))
            if len(fresh) == TOGETHER:
                yield from self._fitting(fresh)
                fresh = []
        yield from self._fitting(fresh)

    def _read(self, row: Row, convert: Converter) -> Prompt | None:
        """The prompt of a row; None for a duplicate, and for one that is left out. Raises Malformed."""
        self.counts.rows += 1
        if row.problem:
            raise Malformed(row.problem)
        try:
            prompt = self._of_source(convert(row))
        except LeftOut as error:
            self.counts.left_out += 1
            self.counts.first_left_out = self.counts.first_left_out or f"{row.where}: {error}"
            return None
        problem = self.problem(prompt)
        if problem is not None:
            raise Malformed(problem)
        return prompt if self._is_new(prompt, row) else None

    def _of_source(self, prompt: Prompt) -> Prompt:
        """The prompt with the system turn and the instruction, and an id that no other source has."""
        if self.system:
            if prompt.messages[0].role == "system":
                raise Malformed(
                    f"the prompt has a system turn of its own, {prompt.messages[0].content!r:.60}, and a key "
                    'system is set: leave it out, or set that of the source to ""'
                )
            prompt = replace(prompt, messages=(Message("system", self.system), *prompt.messages))
        if self.instruction:
            *before, last = prompt.messages
            asked = replace(last, content=instructed(last.content, self.instruction))
            prompt = replace(prompt, messages=(*before, asked))
        if self.source:
            prompt = replace(prompt, id=f"{self.source}/{prompt.id}", source=self.source)
        return prompt

    def _is_new(self, prompt: Prompt, row: Row) -> bool:
        chat, seen = prompt.messages, self.seen
        if chat in self.excluded:
            self.counts.held_out += 1
            return False
        if chat in seen.answers:
            self.counts.duplicates += 1
            self.counts.conflicts += seen.answers[chat] != prompt.answer
            return False
        if prompt.id in seen.places:
            raise Malformed(f"id {prompt.id!r} already names another prompt ({seen.places[prompt.id]})")
        seen.answers[chat] = prompt.answer
        seen.places[prompt.id] = row.where
        return True

    def _skip_malformed(self, row: Row, error: Malformed) -> None:
        if self.limits.malformed == "error":
            raise DataError(
                f"{row.where}: {error} ({self.key}.malformed=skip skips and counts it)"
            ) from error
        self.counts.malformed += 1
        self.counts.first_malformed = self.counts.first_malformed or f"{row.where}: {error}"

    def _fitting(self, fresh: Sequence[tuple[Prompt, Row]]) -> Iterator[Prompt]:
        """The prompts with their ids, without those that are malformed or too long."""
        every = encoded([prompt for prompt, _ in fresh], self.template, self.limits.max_prompt_tokens)
        for (prompt, row), found in zip(fresh, every, strict=True):
            if isinstance(found, Malformed):
                self._skip_malformed(row, found)
            elif isinstance(found, Prompt):
                yield found
            elif self.limits.overlong_prompts == "skip":
                self.counts.overlong += 1
            else:
                raise DataError(
                    f"{row.where}: prompt {prompt.id!r:.80} has {found}, over {self.key}."
                    f"max_prompt_tokens={self.limits.max_prompt_tokens} ({self.key}.overlong_prompts=skip "
                    "skips and counts it)"
                )
