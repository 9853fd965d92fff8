"""Prompts of a run hold one date, whenever and on whatever rank its commands start."""

import json
import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import cast

import pytest

from megatron_troll.config import Config
from megatron_troll.config.load import dump, load
from megatron_troll.evals.task import prepare as prepare_evaluation
from megatron_troll.observe.run_folder import RunFolder, RunFolderError
from megatron_troll.parallel.groups import Group
from megatron_troll.run.made_with import Provenance
from megatron_troll.run.session import of_one_day
from megatron_troll.study.plan import Cell, load_plan
from megatron_troll.study.runner import training
from megatron_troll.task import PROBLEMS, Task, demonstrations, prepare
from tests.unit.demo_task import line, write_config
from tests.unit.study.test_plan import SMALL
from tests.unit.study.test_plan import write as write_study

DATED = "{{ '<|user|>' ~ strftime_now('%Y%m%d') }}"
CONFIG = """
name: trial
runs: {base}/../runs
models: {{policy: {{path: {base}, init: random, layout: {{tp: 1, ep: 1}}}}}}
data: {{files: [{prompts}], held_out: 2, max_prompt_tokens: 64}}
rollout: {{prompts: 4, sampling: {{max_tokens: 8}}}}
sft: {{files: [{prompts}.jsonl]}}
eval: {{all: {{files: [{prompts}], max_prompt_tokens: 64, sampling: {{max_tokens: 8}}}}}}
"""


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    file = folder / "chat_template.jinja"
    own = file.read_text() if file.is_file() else settings.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    file.write_text(DATED + own)
    path = write_config(CONFIG, folder, tmp_path)
    shown = json.loads(line(1))
    shown["messages"].append({"role": "assistant", "content": "1"})
    (tmp_path / "prompts.jsonl.jsonl").write_text(json.dumps(shown) + "\n")
    return path


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Set today's date."""

    def set_today(day: str) -> None:
        class Clock(date):
            @classmethod
            def today(cls) -> date:
                return date.fromisoformat(day)

        monkeypatch.setattr("megatron_troll.task.date", Clock)
        monkeypatch.setattr("megatron_troll.study.runner.date", Clock)

    return set_today


def started(config: Path, *overrides: str) -> Task:
    """A run that has written its configuration and one row of figures."""
    task = prepare(load(config, overrides))
    folder = RunFolder.of(task.config)
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(dump(task.config))
    folder.metrics.write_text('{"step": 1}\n')
    return task


def written(task: Task) -> set[str]:
    """The dates in the prompts of a task."""
    prompts = (*task.prompts.train, *task.prompts.held_out)
    return {str(task.tokenizer.decode(prompt.ids)).split("<|user|>")[1][:8] for prompt in prompts}


def test_a_run_keeps_the_day_of_its_first_start(config: Path, on: Callable[[str], None]) -> None:
    on("2026-11-30")
    first = started(config)
    assert (first.config.date, written(first)) == ("2026-11-30", {"20261130"})
    assert "writes the date 2026-11-30 into every prompt" in str(first)
    on("2026-12-01")
    again = prepare(load(config, ["resume=true"]))
    assert (again.config.date, written(again)) == ("2026-11-30", {"20261130"})
    RunFolder.of(again.config).check(dump(again.config), True)
    assert Provenance.of(again).parts == Provenance.of(first).parts
    assert prepare(load(config, ["name=other"])).config.date == "2026-12-01"


def test_another_day_is_another_configuration(config: Path, on: Callable[[str], None]) -> None:
    on("2026-11-30")
    started(config)
    asked = prepare(load(config, ["resume=true", "date=2026-12-24"]))
    assert written(asked) == {"20261224"}
    folder = RunFolder.of(asked.config)
    with pytest.raises(RunFolderError, match=r"2026-11-30 there, 2026-12-24 now(.|\n)*accept=.template."):
        folder.check(dump(asked.config), True)
    folder.check(dump(asked.config), True, ["template"])


def test_warm_starts_and_evaluations_write_it_too(config: Path, on: Callable[[str], None]) -> None:
    on("2026-11-30")
    task = prepare(load(config, ["date=2026-05-04"]))
    (example,) = demonstrations(task).examples
    assert "20260504" in str(task.tokenizer.decode(example.response_ids))
    for overrides, day in (([], "20261130"), (["date=2026-05-04"], "20260504")):
        evaluated = prepare_evaluation(load(config, overrides))
        (prompt, *_) = evaluated.sets[0].prompts
        assert day in str(evaluated.tokenizer.decode(prompt.ids))
        assert evaluated.config.date is not None


def test_ranks_that_start_around_midnight_agree(config: Path, on: Callable[[str], None]) -> None:
    on("2026-11-30")
    first = prepare(load(config))
    on("2026-12-01")
    second = prepare(load(config))
    assert written(second) == {"20261201"}

    class World:
        def first(self, act: object) -> str | None:
            return first.config.date

    same = of_one_day(second, cast(Group, World()), prepare)
    assert (same.config, written(same)) == (first.config, {"20261130"})
    assert [*map(tuple, (p.ids for p in same.prompts.train))] == [
        *map(tuple, (p.ids for p in first.prompts.train))
    ]
    assert of_one_day(first, cast(Group, World()), prepare) is first


def test_a_template_without_a_date_has_none_to_keep(base: Path, tmp_path: Path) -> None:
    path = write_config(CONFIG, base, tmp_path)
    assert prepare(load(path)).config.date is None
    asked = prepare(load(path, ["date=2026-11-30"]))
    assert "date: 2026-11-30 changes nothing, because the chat template writes no date" in str(asked)
    assert [tuple(p.ids) for p in asked.prompts.train] == [
        tuple(p.ids) for p in prepare(load(path)).prompts.train
    ]


@pytest.mark.parametrize("day", ["2026-02-30", "30.11.2026", "20261130", "today"])
def test_what_is_no_day_is_refused(config: Path, day: str) -> None:
    with pytest.raises(PROBLEMS, match=r"date: got .*expected a day such as 2026-11-30"):
        load(config, [f"date={day!r}"])


def test_the_runs_of_a_study_share_a_day(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: Callable[[str], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    plan = load_plan(write_study(tmp_path, SMALL))
    one, other = list(plan.cells())[:2]
    on("2026-11-30")
    assert "date=2026-11-30" not in training(plan, one).argv

    def of(self: object, cell: Cell) -> Config:
        planned = original(cell)
        policy = planned.policy.model_copy(update={"path": str(tmp_path / "model")})
        return planned.model_copy(update={"models": planned.models.model_copy(update={"policy": policy})})

    original = plan.config
    monkeypatch.setattr(type(plan), "config", of)
    assert training(plan, one).argv[-1] == "date=2026-11-30"
    folder = RunFolder(plan.folder(one))
    folder.root.mkdir(parents=True)
    folder.config.write_text("date: '2026-11-30'\n")
    folder.metrics.write_text("{}\n")
    on("2026-12-01")
    assert training(plan, other).argv[-1] == "date=2026-11-30"
    assert training(plan, one).argv[-1] == "resume=true"
