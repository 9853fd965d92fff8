"""What is said when a configuration cannot be used."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """The configuration cannot be used; the message names the file and line, the key, and what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at what `name` may have meant: the nearest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "known: " + (", ".join(names) or "none")
