r"""The answer that a text states: the last \boxed{...} or `Answer:` line, whichever comes later."""

import re
from dataclasses import dataclass
from typing import Literal

from megatron_troll.data.boxed import last_box

LINE = re.compile(
    r"^[^\w\n]*(?:(?:so|thus|therefore|hence|my|the|final|correct)[ ,]+)*answer(?: is)?[ *_]*[:\uff1a](.*)$",
    re.IGNORECASE | re.MULTILINE,
)
DISPLAY = re.compile(r"(?:\$\$|\\\[)(.*?)(?:\$\$|\\\])", re.DOTALL)


OPEN, CLOSE = "<think>", "</think>"


def after_reasoning(text: str, opened: bool) -> str | None:
    """The text after the last </think>, or the whole text if it holds no reasoning. None if reasoning is not
    closed: there is no answer yet. `opened`: the prompt ends with <think>."""
    _, closed, rest = text.rpartition(CLOSE)
    if OPEN in rest or (opened and not closed):
        return None
    return rest


def last_tagged(text: str, tag: str) -> str | None:
    """The text of the last <tag>...</tag>; None if there is none."""
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside if closed and opened else None


@dataclass(frozen=True)
class Stated:
    """An answer as a text states it; `start` is its place."""

    text: str
    start: int
    by: Literal["box", "line"]


def stated(text: str) -> Stated | None:
    """The last answer that `text` states; None if it has neither a box that closes nor an `Answer:` line."""
    found = [one for one in (_last_box(text), _last_line(text)) if one is not None]
    return max(found, key=lambda one: one.start, default=None)


def _last_box(text: str) -> Stated | None:
    box = last_box(text)
    return None if box is None else Stated(box.content, box.start, "box")


def _last_line(text: str) -> Stated | None:
    r"""The last `Answer:` line; if nothing follows the colon, the next line or \[...\]."""
    last = next(reversed(list(LINE.finditer(text))), None)
    if last is None:
        return None
    content = last[1].strip(" \t*_")
    if not content or content.endswith(":"):
        below = text[last.end() :].strip()
        display = DISPLAY.match(below)
        content = display[1] if display else below.partition("\n")[0]
    return Stated(content, last.start(), "line")
