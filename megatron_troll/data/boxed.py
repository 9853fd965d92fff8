r"""The last \boxed{...} of a text."""

import re
from typing import NamedTuple

# A box, an escaped character, or a brace. Escaped braces, as in \{1,2\}, do not count.
BRACES = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(?=(?P<bare>[^\s{\\$]+)))|\\.|[{}]", re.DOTALL)


class Box(NamedTuple):
    """The content of a box, and its place in the text."""

    content: str
    start: int


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close; None if there is none. Linear in the text."""
    box = last_box(text)
    return None if box is None else box.content


def last_box(text: str) -> Box | None:
    r"""The last \boxed{...} whose braces close; None if there is none."""
    last: Box | None = None
    opened: list[tuple[int, int, bool]] = []
    for mark in BRACES.finditer(text):
        token = mark[0]
        if mark["bare"] is not None:
            last = _later(last, Box(mark["bare"], mark.start()))
        elif token.endswith("{") and token != r"\{":
            opened.append((mark.start(), mark.end(), token != "{"))
        elif token == "}" and opened:
            start, inside, box = opened.pop()
            if box:
                last = _later(last, Box(text[inside : mark.start()], start))
    return last


def _later(last: Box | None, found: Box) -> Box:
    return last if last is not None and last.start > found.start else found
