"""From run folders to a results file and a page."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from megatron_troll.cli.main import main
from megatron_troll.config.load import dump
from megatron_troll.study.plan import Cell, StudyPlan, load_plan
from megatron_troll.study.plots import plot, plot_survival
from megatron_troll.study.report import markdown
from megatron_troll.study.results import (
    RunResult,
    beside,
    finished,
    gather,
    read_results,
    result_of,
    write_results,
)
from tests.unit.study.test_outcomes import RESULT
from tests.unit.study.test_plan import SMALL, write

COMPARISONS = """
comparisons:
  - {claim: TROLL is better, setting: calm, outcome: final_success, a: tight, b: clip, expect: higher}
  - {claim: TROLL is steadier, setting: calm, outcome: jitter2, a: tight, b: clip, expect: lower}
  - {claim: TROLL is bolder, setting: wild, outcome: entropy, a: tight, b: clip, expect: higher}
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StudyPlan:
    monkeypatch.chdir(tmp_path)
    return load_plan(write(tmp_path, SMALL + COMPARISONS))


def make_run(plan: StudyPlan, cell: Cell, steps: int = 7, ended: bool = True) -> None:
    folder = plan.folder(cell)
    folder.mkdir(parents=True)
    rows: list[dict[str, float | None]] = [{"step": 0, "held_out_success": 0.25}]
    for step in range(1, steps + 1):
        row = {
            "held_out_success": step / 10,
            "entropy": 1 / step,
            "skipped_updates": 0,
            "response_length": 5.5,
        }
        rows.append({"step": step} | row)
    rows[-1] |= {"entropy": None, "skipped_updates": 3}
    beside(folder).write_text(dump(plan.config(cell)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ended:
        (folder / "summary.json").write_text('{"seconds": 12.34}')


def results(plan: StudyPlan, gain: float) -> dict[Cell, RunResult]:
    """Of the calm setting: the tight method ends higher by `gain` in every seed."""
    found = {}
    for cell in plan.cells():
        if cell.setting == "calm":
            last = 0.6 + 0.05 * cell.seed - (0.0 if cell.method == "tight" else gain)
            named = replace(
                RESULT, setting=cell.setting, method=cell.method, seed=cell.seed, digest=plan.digest(cell)
            )
            found[cell] = replace(named, held_out=(0.5, 0.6, last))
    return found


def test_a_finished_run_is_summed_up(plan: StudyPlan) -> None:
    cell = Cell("wild", "clip", 3)
    make_run(plan, cell)
    assert finished(plan, cell)
    result = result_of(plan, cell)
    assert (result.before, result.held_out[-1], result.entropy[-1]) == (0.25, 0.7, None)
    assert (result.responses, result.tokens) == (64 * 8 * 7, round(64 * 8 * 7 * 5.5))
    assert (result.updates, result.skipped, result.seconds) == (8 * 7 - 3, 3, 12.3)


@pytest.mark.parametrize(("steps", "ended"), [(7, False), (6, True)])
def test_a_run_that_stopped_early_is_not_finished(plan: StudyPlan, steps: int, ended: bool) -> None:
    cell = Cell("calm", "clip", 3)
    assert not finished(plan, cell)
    make_run(plan, cell, steps, ended)
    assert not finished(plan, cell)


def test_a_run_of_another_configuration_is_none_of_the_plans(plan: StudyPlan, tmp_path: Path) -> None:
    make_run(plan, Cell("calm", "tight", 3))
    tighter = load_plan(write(tmp_path, SMALL.replace("bound: 0.01", "bound: 0.02")))
    assert not finished(tighter, Cell("calm", "tight", 3))


def test_results_outlive_the_run_folders_and_the_plan_does_not_see_what_is_not_its(
    plan: StudyPlan, tmp_path: Path
) -> None:
    path = tmp_path / "results" / "study.json"
    kept = results(plan, 0.1)
    gone = replace(RESULT, method="no longer planned")
    write_results(path, [*kept.values(), gone])
    make_run(plan, Cell("wild", "clip", 3))
    found = gather(plan, path)
    assert found == kept | {Cell("wild", "clip", 3): result_of(plan, Cell("wild", "clip", 3))}
    assert read_results(path) == found | {gone.cell: gone}
    assert len(path.read_text().splitlines()) == len(found) + 3


def test_a_result_of_other_settings_does_not_count(plan: StudyPlan, tmp_path: Path) -> None:
    path = tmp_path / "results" / "study.json"
    write_results(path, results(plan, 0.1).values())
    clearer = load_plan(write(tmp_path, SMALL + COMPARISONS.replace("is better", "learns more")))
    assert {cell.method for cell in gather(clearer, path)} == {"clip", "tight"}
    tighter = load_plan(write(tmp_path, SMALL.replace("bound: 0.01", "bound: 0.02")))
    assert {cell.method for cell in gather(tighter, path)} == {"clip"}


def test_a_page_says_what_showed_and_what_did_not(plan: StudyPlan) -> None:
    page = markdown(plan, results(plan, 0.1), "study.yaml", "images/{setting}.png")
    assert "2 methods x 2 seeds x 2 settings: 4 of 8 runs finished" in page
    assert "Run before they were written: nothing" in page
    row = "| TROLL is better | calm | final success | tight | clip | higher | +0.100 [+0.100, +0.100] "
    assert f"{row}| as claimed |" in page
    assert "- TROLL is steadier (calm, Jitter2): came out the other way round." in page
    assert "| TROLL is bolder | wild | entropy | tight | clip | higher | - | not run |" in page
    assert "TROLL is better (calm" not in page
    assert "![calm](images/calm.png)" in page
    assert "## wild" not in page


def test_tables_hold_levels_and_paired_differences_from_the_baseline(plan: StudyPlan) -> None:
    page = markdown(plan, results(plan, 0.1), "study.yaml", None)
    assert "| clip | 0.675 [0.650, 0.700] |" in page
    assert "| tight | +0.100 [+0.100, +0.100] |" in page
    assert "0 of 2" in page


def test_curves_are_drawn(plan: StudyPlan, tmp_path: Path) -> None:
    path = tmp_path / "images" / "calm.png"
    plot(plan, "calm", results(plan, 0.1), path)
    assert imread(path).std() > 0.05


def test_survival_is_shown_where_a_run_collapsed(plan: StudyPlan, tmp_path: Path) -> None:
    fine = results(plan, 0.1)
    assert "survival" not in markdown(plan, fine, "study.yaml", "images/{setting}.png")
    cell = next(cell for cell in fine if cell.method == "clip")
    found = fine | {cell: replace(fine[cell], held_out=(0.5, 0.2, 0.1))}
    assert "![Survival](images/calm-survival.png)" in markdown(
        plan, found, "study.yaml", "images/{setting}.png"
    )
    pictures = [tmp_path / f"{name}.png" for name in ("fine", "collapsed")]
    for picture, drawn in zip(pictures, (fine, found)):
        plot_survival(plan, "calm", drawn, picture)
    assert (imread(pictures[0]) != imread(pictures[1])).any()


def test_the_command_draws_from_the_results_file_alone(plan: StudyPlan, tmp_path: Path) -> None:
    found = results(plan, 0.1)
    collapsed = [replace(result, held_out=(0.5, 0.2, 0.1)) for result in found.values()]
    write_results(tmp_path / "results" / "study.json", collapsed)
    assert main(["study", "report", str(tmp_path / "study.yaml"), "--output", "out/page.md"]) == 0
    page = Path("out/page.md").read_text()
    for name in ("images/page-calm.png", "images/page-calm-survival.png"):
        assert f"({name})" in page
        assert imread(Path("out") / name).std() > 0.05
