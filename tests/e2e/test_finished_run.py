"""What a finished run leaves for its reader."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_troll.config.load import load
from megatron_troll.mcore.version import pinned
from tests.documented import documented
from tests.e2e.workplace import Workplace, succeed


def test_one_row_a_step_of_documented_fields(finished: Workplace) -> None:
    rows = finished.metrics("finished")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "held_out_success" in row] == [0, 2, 4]
    assert [name for row in rows for name in row if not documented(name)] == []
    assert all(row["grad_norm"] > 0 and row["skipped_updates"] == 0 for row in rows[1:])


def test_the_summary_says_what_training_changed(finished: Workplace) -> None:
    summary = json.loads((finished.run("finished") / "summary.json").read_text())
    rows = finished.metrics("finished")
    assert summary["held_out_success_before"] == rows[0]["held_out_success"]
    assert summary["held_out_success_after"] == rows[-1]["held_out_success"]
    assert summary["seed"] == 0
    assert 0 < sum(row["seconds"] for row in rows) <= summary["seconds"] * 1.01
    assert summary["versions"]["megatron-core"] == pinned()


def test_the_resolved_config_is_kept_whole(finished: Workplace) -> None:
    path = finished.run("finished") / "config.yaml"
    kept = yaml.safe_load(path.read_text())
    assert "extends" not in kept
    assert kept["objective"]["trust_region"] == {
        "name": "troll",
        "bound": 0.05,
        "alpha": 1.0,
        "k": 16,
        "delta": 1e-4,
        "p_d": 1e-12,
        "support": "old",
    }
    assert load(path).train.steps == 4


def test_tensorboard_has_the_same_curves(finished: Workplace) -> None:
    events = EventAccumulator(str(finished.run("finished") / "tensorboard")).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("loss")]
    rows = finished.metrics("finished")[1:]
    assert [step for step, _ in loss] == [row["step"] for row in rows]
    assert all(abs(value - row["loss"]) < 1e-6 for (_, value), row in zip(loss, rows, strict=True))


def test_a_run_whose_checkpoints_were_deleted_is_not_begun_anew(finished: Workplace) -> None:
    shutil.copytree(finished.run("finished"), finished.run("expired"))
    shutil.rmtree(finished.run("expired") / "checkpoints")
    done = finished.mtroll("train", "tiny.yaml", "name=expired", "resume=true")
    assert done.code == 2
    assert done.err[0].startswith("runs/expired/checkpoints holds no checkpoint any longer, and step 4 was")
    assert finished.metrics("expired") == finished.metrics("finished")


def test_the_last_checkpoints_and_the_best_are_kept(finished: Workplace) -> None:
    """keep_last is 2; the best of those that were evaluated is step 2 or 4."""
    kept = {path.name for path in (finished.run("finished") / "checkpoints").iterdir()}
    assert {"step_000003", "step_000004"} <= kept <= {"step_000002", "step_000003", "step_000004"}


def test_a_checkpoint_is_younger_than_the_row_of_its_step(finished: Workplace) -> None:
    """So that a kill between the two leaves a row that is made again, not a step without one."""
    events = EventAccumulator(str(finished.run("finished") / "tensorboard")).Reload()
    logged = {event.step: event.wall_time for event in events.Scalars("seconds")}
    for path in (finished.run("finished") / "checkpoints").iterdir():
        assert (path / "checkpoint.json").stat().st_mtime > logged[int(path.name[5:])], path


def test_rollouts_can_be_browsed(finished: Workplace) -> None:
    shown = succeed(finished.mtroll("rollouts", "runs/finished", "--step", "3", "--limit", "2"))
    sample = _first(finished.run("finished") / "rollouts")
    succeed(finished.mtroll("rollouts", "runs/finished", "--step", "1", "--html", "rollouts.html"))
    page = (finished.root / "rollouts.html").read_text()
    assert "sort" in shown.out
    assert sample["prompt"] in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_two_runs_are_compared_in_one_page(finished: Workplace) -> None:
    succeed(finished.mtroll("report", "runs/finished", "runs/demo-warm-start", "--output", "both.html"))
    page = (finished.root / "both.html").read_text()
    assert "finished" in page
    assert "demo-warm-start" in page
    for name in ("report.html", "curves.png"):
        assert (finished.run("finished") / name).stat().st_size > 10_000


def _first(folder: Path) -> dict[str, Any]:
    with gzip.open(folder / "step_000001.0-of-1.jsonl.gz", "rt") as file:
        return json.loads(file.readline())
