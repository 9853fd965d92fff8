"""The process that makes tasks: jobs as JSON on stdin, the items as JSON lines on stdout.

It runs as `python -m megatron_troll.data.gym.make` with PYTHONHASHSEED=0: five data sets order what they draw
by the hashes of texts, which differ from process to process, so that ranks would have different questions.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megatron_troll.data.gym.encoding import decode, encode
from megatron_troll.data.gym.library import (
    BLOCK,
    Entry,
    GymError,
    Library,
    first_seed,
    highest_level,
    item,
    judged,
    open_set,
)

ITEM_LIMIT_S = 60.0
# Texts that no scorer should give full marks where they are not the answer; tried on the first items.
PROBES = ("", "0", "1", "nan", "True", "yes", "no answer")
TRIED_ITEMS, TRIED_ANSWERS, MOST = 12, 3, 0.75
# Items looked at for each distinct question wanted.
ATTEMPTS = 8


@dataclass(frozen=True)
class Job:
    """Items to make from the seeds of `seed`: `count` to train on, of every level from `levels[0]` to
    `levels[1]` (None: the highest); or to be held out, as many as it takes to have `count` questions, of the
    last level alone. levels None: the set's options say how hard they are."""

    key: str
    name: str
    options: dict[str, Any]
    seed: int
    count: int
    held_out: bool
    levels: tuple[int, int | None] | None = None


@dataclass(frozen=True)
class Part:
    """The items of one level of a job."""

    job: Job
    level: int | None

    @property
    def first(self) -> int:
        """The seed of the first item."""
        return first_seed(self.job.seed, self.level or 0, self.job.held_out)

    @property
    def size(self) -> int:
        """The number of items that are looked at at most."""
        return min(BLOCK, ATTEMPTS * self.job.count) if self.job.held_out else self.job.count

    @property
    def name(self) -> str:
        return self.job.name + ("" if self.level is None else f" at level {self.level}")

    def open(self) -> Library:
        with limited():
            return open_set(self.job.name, self.job.options, self.first, self.size, self.level)


class TooSlow(Exception):
    """An item, or the score of one, took longer than ITEM_LIMIT_S."""


def made(job: Job) -> dict[str, Any]:
    """The `parts` of a job, one a level: its `rows`, each with index, entry, and the problem of an item that
    cannot be used. Or the `problem` with the whole data set, with the `option` at fault."""
    try:
        return {"parts": [_made(Part(job, level)) for level in _levels(job)]}
    except GymError as error:
        return {"problem": str(error), "option": error.option}
    except TooSlow:
        return {"problem": f"{job.name} was not made within {ITEM_LIMIT_S:g} s", "option": ""}


def _levels(job: Job) -> Sequence[int | None]:
    if job.levels is None:
        return [None]
    first, last = job.levels
    top = highest_level(job.name)
    for key, level in (("first", first), ("last", last)):
        if level is not None and level > top:
            raise GymError(f"{job.name} has the levels 0 to {top}, and not {level}", f"curriculum.{key}")
    last = top if last is None else last
    return [last] if job.held_out else range(first, last + 1)


def _made(part: Part) -> dict[str, Any]:
    opened = part.open()
    rows = list(_rows(part, opened))
    _try_out(part.job.name, opened, [row["entry"] for row in rows[:TRIED_ITEMS]])
    return {"level": part.level, "rows": rows}


def _rows(part: Part, opened: Library) -> Iterator[dict[str, Any]]:
    job, name = part.job, part.name
    questions: set[str] = set()
    first_problem = ""
    for index in range(part.size):
        if job.held_out and len(questions) == job.count:
            return
        try:
            with limited():
                entry = encode(item(opened, index, part.first))
        except TooSlow:
            raise GymError(f"item {index} of {name} was not made within {ITEM_LIMIT_S:g} s") from None
        except Exception as error:
            raise GymError(f"item {index} of {name} cannot be made: {_told(error)}") from error
        if job.held_out and entry["question"] in questions:
            continue
        problem = _problem(job.name, opened, entry)
        if problem is None:
            questions.add(entry["question"])
        else:
            first_problem = first_problem or f"; item {index}: {problem}"
        yield {"index": index, "entry": entry, "problem": problem}
    if job.held_out and len(questions) < job.count:
        raise GymError(
            f"{name} has only {len(questions):,} distinct questions in {part.size:,} items: too few to hold "
            f"{job.count:,} out{first_problem}"
        )


def _problem(name: str, opened: Library, entry: Entry) -> str | None:
    """The reason for which an item cannot be used: its scorer does not take the item's own answer."""
    gold = entry["answer"]
    if gold is None:
        return None
    try:
        score = score_of(name, opened, gold.strip(), entry)
    except TooSlow:
        return f"the scorer of {name} takes over {ITEM_LIMIT_S:g} s for its own answer {gold!r:.80}"
    except Exception as error:  # noqa: BLE001 (the border of the library; the item is named)
        return f"the scorer of {name} raises on its own answer {gold!r:.80}: {_told(error)}"
    return None if score == 1 else f"the scorer of {name} gives its own answer {gold!r:.80} only {score:g}"


def _try_out(name: str, opened: Library, entries: list[Entry]) -> None:
    """Raise GymError if one text earns full marks for most of the items of which it is not the answer."""
    answers = [entry["answer"] for entry in entries if entry["answer"] is not None]
    for text in (*PROBES, *answers[:TRIED_ANSWERS]):
        others = [
            entry
            for entry in entries
            if (entry["answer"] or "").strip().casefold() != text.strip().casefold()
        ]
        if len(others) < TRIED_ITEMS // 2:
            continue
        right = sum(full(name, opened, text, entry) for entry in others)
        if right > MOST * len(others):
            raise GymError(
                f"the scorer of {name} gives {text!r:.80} full marks on {right} of {len(others)} questions "
                "with another answer"
            )


def full(name: str, opened: Library, text: str, entry: Entry) -> bool:
    try:
        return score_of(name, opened, text, entry) == 1
    except Exception:  # noqa: BLE001 (what it raises on wrong answers costs a run only these)
        return False


def score_of(name: str, opened: Library, text: str, entry: Entry) -> float:
    """The score of an answer to an entry as it is stored."""
    with limited():
        return judged(opened, name, text, decode(entry))


@contextmanager
def limited() -> Iterator[None]:
    """Raise TooSlow in the block after ITEM_LIMIT_S."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, ITEM_LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def main() -> None:
    # Data sets print; what they print is no item.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for job in json.load(sys.stdin):
            out.write(json.dumps(made(Job(**job))) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
