"""The pages of studies are made of the results beside their files, which are of the studies as they stand."""

from pathlib import Path

import pytest

from megatron_troll.study.plan import load_plan
from megatron_troll.study.report import markdown
from megatron_troll.study.results import read_results, results_path
from tests.house.markdown import ROOT

PAGES = {"examples/study/study.yaml": "study", "examples/study/jackpot.yaml": "study-jackpot"}


@pytest.mark.parametrize("file", PAGES)
def test_a_page_is_made_of_the_results_of_its_study(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    plan, results = load_plan(Path(file)), read_results(results_path(Path(file)))
    assert set(results) == set(plan.cells())
    assert all(result.digest == plan.digest(cell) for cell, result in results.items())
    page = markdown(plan, results, file, f"images/{PAGES[file]}-{{setting}}.png")
    assert (ROOT / "docs" / f"{PAGES[file]}.md").read_text() == page
