"""What the documentation holds: its pages, code blocks, commands and links."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from megatron_troll.config import Config
from megatron_troll.config.load import load

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """Its code blocks of one language."""
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def configurations(page: Path, place: Path) -> list[Config]:
    """Its YAML blocks, loaded as files that lie in the root of the repository."""
    (place / "examples").symlink_to(ROOT / "examples")
    path = place / "example.yaml"
    loaded = []
    for text in blocks(page, "yaml"):
        path.write_text(text)
        loaded.append(load(path))
    return loaded


def commands(page: Path) -> Iterator[list[str]]:
    """Every line of the page's sh blocks as words, comments left out."""
    for text in blocks(page, "sh"):
        for line in text.splitlines():
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
