"""What the documentation holds: its pages, code blocks, commands and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    language: str
    text: str


def blocks(page: Path, language: str) -> list[Block]:
    found = [Block(*match.groups()) for match in FENCE.finditer(page.read_text())]
    return [block for block in found if block.language == language]


def commands(page: Path) -> Iterator[list[str]]:
    """Every line of the page's sh blocks as words, comments left out."""
    for block in blocks(page, "sh"):
        for line in block.text.splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def links(page: Path) -> list[str]:
    """Targets of links and pictures, outside code blocks."""
    return LINK.findall(FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives the page's headings."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text()))
