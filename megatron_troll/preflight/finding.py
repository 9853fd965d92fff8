"""The result of a check."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One check on one node. text: what was found; advice: how to fix it, if something is wrong."""

    check: str
    level: Level
    text: str
    advice: str = ""


def passed(check: str, text: str) -> Finding:
    return Finding(check, "ok", text)


def failed(check: str, text: str, advice: str) -> Finding:
    return Finding(check, "failed", text, advice)


def warned(check: str, text: str, advice: str) -> Finding:
    return Finding(check, "warning", text, advice)
