"""docs/migrating.md: every key of ours exists, every value of ours is taken."""

import re
from collections.abc import Iterator

import pytest

from megatron_troll.config import Config
from megatron_troll.config.load import load
from megatron_troll.config.shape import Shape
from megatron_troll.objectives.compose import compose
from tests.house.markdown import ROOT

PAGE = ROOT / "docs" / "migrating.md"
EXAMPLE = ROOT / "examples" / "configs" / "cpu_troll.yaml"


def rows() -> Iterator[list[str]]:
    """Theirs, ours and the difference, of every row of the tables."""
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| theirs"):
            yield [cell.strip() for cell in line.split("|")[1:-1]]


def named() -> list[str]:
    return sorted({code for _, ours, _ in rows() for code in re.findall(r"`([^`]+)`", ours)})


def test_every_row_says_where_or_that_there_is_none() -> None:
    silent = [theirs for theirs, ours, _ in rows() if ours != "none" and "`" not in ours]
    assert silent == []
    assert len(list(rows())) > 100


@pytest.mark.parametrize("code", named())
def test_ours_exists(code: str) -> None:
    key, _, value = code.partition("=")
    assert Shape.of(Config).walk(key.split(".")) is not None, key
    if value:
        compose(load(EXAMPLE, [code]).objective)
