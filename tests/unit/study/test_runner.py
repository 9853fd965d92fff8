"""What a study still has to run."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_troll.config import ConfigError
from megatron_troll.config.load import dump
from megatron_troll.study.plan import Cell, load_plan
from megatron_troll.study.results import beside, write_results
from megatron_troll.study.runner import run_study
from megatron_troll.system import Interrupts
from tests.unit.study.test_outcomes import RESULT
from tests.unit.study.test_plan import SMALL, write


def test_a_run_whose_result_is_known_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = load_plan(write(tmp_path, SMALL))
    known = [
        replace(RESULT, setting=cell.setting, method=cell.method, seed=cell.seed, digest=plan.digest(cell))
        for cell in plan.cells()
    ]
    write_results(tmp_path / "study.json", known)
    said: list[str] = []
    assert run_study(plan, tmp_path / "study.json", 1, Interrupts(), said.append)
    assert said == []
    assert not plan.root.exists()


def test_a_folder_with_a_run_of_another_configuration_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = load_plan(write(tmp_path, SMALL))
    folder = plan.folder(Cell("calm", "tight", 3))
    folder.mkdir(parents=True)
    beside(folder).write_text(dump(plan.config(Cell("calm", "clip", 3))))
    with pytest.raises(ConfigError, match="calm/tight was started with another configuration than the study"):
        run_study(plan, tmp_path / "study.json", 1, Interrupts(), print)
