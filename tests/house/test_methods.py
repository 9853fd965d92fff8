"""docs/methods.md is true: every method has its section, its line loads, its row says what the code does."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
import torch
import yaml

from megatron_troll.config import Config, ObjectiveConfig, find_class, known_methods
from megatron_troll.config.load import load
from megatron_troll.objectives.aggregation import Aggregation
from megatron_troll.objectives.compose import SLOTS, compose
from tests.house.markdown import ROOT
from tests.unit.objectives.rows import gradient, sample
from tools import method_tables

PAGE = (ROOT / "docs" / "methods.md").read_text()
LABELS = ["What", "When", "Config", "Paper", "Ours"]
ARXIV = re.compile(r"\d{4}\.\d{5}")
BESIDE = {"aggregation": get_args(Aggregation), "entropy_over": ("full", "sparse")}


class Section(NamedTuple):
    """What the page says of one method: its text, and its lines by label; `preface` opens the part."""

    preface: str
    text: str
    lines: dict[str, str]


@cache
def sections() -> dict[str, Section]:
    found = {}
    for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]:
        preface, *each = re.split(r"^### ", part, flags=re.MULTILINE)
        for text in each:
            items = re.findall(r"^- \*\*(\w+)\*\*: (.*?)(?=^- \*\*|\Z)", text, re.MULTILINE | re.DOTALL)
            found[text.splitlines()[0].strip("`")] = Section(preface, text, dict(items))
    return found


def named() -> list[str]:
    slots = {slot: known_methods(folder) for slot, (folder, _) in SLOTS.items()} | BESIDE
    return [f"{slot}: {name}" for slot, names in slots.items() for name in names]


every = pytest.mark.parametrize("method", named())


def test_every_method_has_its_section() -> None:
    assert sorted(sections()) == sorted(named())


@every
def test_five_lines(method: str) -> None:
    section = sections()[method]
    assert list(section.lines) == LABELS
    assert all(line.strip() for line in section.lines.values())
    paper = section.lines["Paper"]
    assert ARXIV.search(paper) or re.search(r"no\s+(paper|arXiv)|not\s+on\s+arXiv", paper)


@every
def test_its_papers_are_those_of_its_file(method: str) -> None:
    slot, name = method.split(": ")
    if slot not in SLOTS:
        return
    module = find_class(name, *SLOTS[slot], slot).__module__
    source = ROOT / f"{module.replace('.', '/')}.py"
    assert set(ARXIV.findall(source.read_text())) <= set(ARXIV.findall(sections()[method].text))


def configured(method: str, place: Path) -> Config:
    """Its line, with that of its part where there is one, on top of an example."""
    section = sections()[method]
    lines = re.findall(
        r"`((?:models|objective): [^`]+|\{[^`]+\})`", section.preface + section.lines["Config"]
    )
    names = [str(ROOT / "examples/configs/cpu_troll.yaml")]
    for i, line in enumerate(lines):
        (place / f"{i}.yaml").write_text(line)
        names.append(f"{i}.yaml")
    whole = place / "whole.yaml"
    whole.write_text(yaml.safe_dump({"extends": names}))
    return load(whole)


@every
def test_its_line_loads_and_composes(method: str, tmp_path: Path) -> None:
    config = configured(method, tmp_path)
    slot, name = method.split(": ")
    chosen = getattr(config.objective, slot)
    assert name == (chosen.name if slot in SLOTS else chosen)
    objective = compose(config.objective)
    assert objective.needs_reference == (config.models.reference is not None and name != "none")
    assert objective.advantage.needs_values == (config.models.critic is not None)
    assert (objective.entropy is not None) == (slot == "entropy_over")


@pytest.mark.parametrize("table", ["combinations", "exceptions", "needs"])
def test_the_tables_are_current(table: str) -> None:
    assert getattr(method_tables, table)() in PAGE, "see tools/method_tables.py"


@pytest.mark.parametrize("method", [m for m in named() if m.startswith(("trust_region", "kl"))])
def test_the_gradient_reaches_what_the_table_says(method: str) -> None:
    """Measured: how many logits of a row the loss moves with, out of V = 24, where a record keeps K = 4."""
    slot, name = method.split(": ")
    kind = find_class(name, *SLOTS[slot], slot)
    fields = {"k": 4, "delta": 0.0, "beta": 1.0}
    if "p_d" not in kind.model_fields:
        fields.pop("delta")
    own = {key: value for key, value in fields.items() if key in kind.model_fields}
    rows = sample([5, 3, 0, 4], vocab=24)
    if slot == "kl":  # The score of a zero advantage has no gradient.
        rows = replace(rows, advantage=torch.zeros_like(rows.advantage))
    chosen = {"trust_region": {"name": "none"}} | {slot: {"name": name, **own}}
    moved = (gradient(compose(ObjectiveConfig.model_validate(chosen)), rows) != 0).sum(1).max()
    says = method_tables.gradient_through(kind(**own).reads)  # pyright: ignore[reportAttributeAccessIssue]
    assert moved == 24 if says == "full softmax" else moved <= 5
    assert (moved > 0) == (says != "")
