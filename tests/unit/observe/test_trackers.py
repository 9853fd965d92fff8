"""What is logged can be read back by the tools that read it."""

import json
import math
from importlib.metadata import version
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_troll.config import Observe
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.observe.trackers import JsonLines, Summary, open_trackers, write_summary


def test_a_step_is_one_json_object_on_disk_at_once(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl")
    lines.log(1, {"loss": 0.5, "kl_before": math.nan, "ratio/max": math.inf})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {"step": 1, "loss": 0.5, "kl_before": None, "ratio/max": None}
    lines.close()


def test_a_second_writer_appends(tmp_path: Path) -> None:
    for step in (1, 2):
        lines = JsonLines(tmp_path / "metrics.jsonl")
        lines.log(step, {})
        lines.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_tensorboard_drops_what_a_resumed_run_logs_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for start, steps, loss in ((0, (1, 2, 3), 0.0), (2, (2, 3), 1.0)):
        trackers = open_trackers(folder, Observe(), {}, start)
        for step in steps:
            trackers.log(step, {"loss": loss + step})
        trackers.close()
    events = EventAccumulator(str(folder.tensorboard)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 3.0), (3, 4.0)]


def test_tensorboard_can_be_off(tmp_path: Path) -> None:
    open_trackers(RunFolder(tmp_path), Observe(tensorboard=False), {}, 0).close()
    assert not RunFolder(tmp_path).tensorboard.exists()


def test_summary_holds_result_and_versions(tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", Summary(0.41, 0.95, 300.5, 7, ("experimental",)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    versions = summary.pop("versions")
    assert summary == {
        "remarks": ["experimental"],
        "held_out_success_before": 0.41,
        "held_out_success_after": 0.95,
        "seconds": 300.5,
        "seed": 7,
    }
    assert versions["torch"] == version("torch")
    assert set(versions) == {"python", "torch", "megatron-core", "transformers", "megatron-troll"}
