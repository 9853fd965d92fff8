"""A run folder belongs to one process and one config, and going back to a checkpoint loses nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_troll.config.document import render
from megatron_troll.observe.rewind import Rewound, ranges, rewind
from megatron_troll.observe.run_folder import RunFolder, RunFolderError, flat_config
from megatron_troll.system import write_atomic

CONFIG = "name: demo\nresume: false\ntrain: {steps: 30, updates: 4}\nmodels: {policy: {layout: {tp: 2}}}\n"

OPEN = """
import sys
from pathlib import Path
from megatron_troll.observe.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).open(sys.argv[2], resume=True):
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "runs" / "demo")


def finished(folder: RunFolder) -> RunFolder:
    """A folder that holds one step of a run of CONFIG."""
    with folder.open(CONFIG, resume=False):
        folder.metrics.write_text('{"step": 1}\n')
    return folder


def test_a_new_run_writes_its_config(folder: RunFolder) -> None:
    with folder.open(CONFIG, resume=False):
        assert folder.config.read_text() == CONFIG
    assert sorted(path.name for path in folder.root.iterdir()) == ["config.yaml", "lock"]


def test_another_process_is_told_who_holds_the_folder(folder: RunFolder) -> None:
    command = [sys.executable, "-c", OPEN, str(folder.root), CONFIG]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"open\n"
        with (
            pytest.raises(RunFolderError, match=rf"being written by pid {holder.pid} on \S+"),
            folder.open(CONFIG, resume=True),
        ):
            pytest.fail("opened")
        holder.stdin.close()
        holder.wait(10)
    with folder.open(CONFIG, resume=True):
        assert f"pid {os.getpid()} " in (folder.root / "lock").read_text()


def test_a_check_refuses_like_opening_and_writes_nothing(folder: RunFolder) -> None:
    folder.check(CONFIG, resume=False)
    assert not folder.root.exists()
    finished(folder)
    command = [sys.executable, "-c", OPEN, str(folder.root), CONFIG]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(RunFolderError, match=f"being written by pid {holder.pid}"):
            folder.check(CONFIG, resume=True)
        assert f"pid {holder.pid} " in (folder.root / "lock").read_text()
        holder.kill()
    folder.check(CONFIG.replace("name: demo", "name: renamed"), resume=True)
    with pytest.raises(RunFolderError, match=r"train\.updates: 4 there, 2 now"):
        folder.check(CONFIG.replace("updates: 4", "updates: 2"), resume=True)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew_in_silence(folder: RunFolder) -> None:
    finished(folder)
    folder.check(CONFIG, resume=True)  # killed before its first checkpoint
    write_atomic(folder.saved, "20\n")
    with pytest.raises(RunFolderError, match=r"checkpoints holds no checkpoint .* step 20 was saved there"):
        folder.check(CONFIG, resume=True)
    (folder.checkpoints / "step_000020").mkdir(parents=True)
    folder.check(CONFIG, resume=True)


def test_a_killed_holder_leaves_the_folder_free(folder: RunFolder) -> None:
    command = [sys.executable, "-c", OPEN, str(folder.root), CONFIG]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        holder.kill()
    with folder.open(CONFIG, resume=True):
        pass


def test_another_config_is_refused_and_its_keys_named(folder: RunFolder) -> None:
    finished(folder)
    other = CONFIG.replace("updates: 4", "updates: 2, epochs: 3").replace("steps: 30", "steps: 60")
    with pytest.raises(RunFolderError) as caught, folder.open(other, resume=True):
        pytest.fail("opened")
    assert "train.updates: 4 there, 2 now" in str(caught.value)
    assert "train.epochs: (absent) there, 3 now" in str(caught.value)
    assert "train.steps" not in str(caught.value)
    assert folder.config.read_text() == CONFIG


def test_a_resumed_run_may_go_on_longer_and_on_another_layout(folder: RunFolder) -> None:
    finished(folder)
    longer = CONFIG.replace("resume: false", "resume: true").replace("30", "60").replace("tp: 2", "tp: 1")
    with folder.open(longer, resume=True):
        assert folder.config.read_text() == longer
    assert folder.metrics.read_text() == '{"step": 1}\n'


def test_a_run_is_not_started_over_unasked(folder: RunFolder) -> None:
    finished(folder)
    with pytest.raises(RunFolderError, match="resume=true"), folder.open(CONFIG, resume=False):
        pytest.fail("opened")


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_evaluation_is_not_overwritten(folder: RunFolder, resume: bool) -> None:
    with folder.open(CONFIG, resume=False):
        folder.evaluation.write_text("{}")
    with pytest.raises(RunFolderError, match="holds a finished evaluation"):
        folder.check(CONFIG, resume)


def test_data_sets_of_an_evaluation_may_come_later(folder: RunFolder) -> None:
    finished(folder).check(CONFIG + "eval: {easy: {files: [f]}}\n", resume=True)


def test_a_run_that_ended_before_its_first_figures_can_start_again_with_another_config(
    folder: RunFolder,
) -> None:
    for config in (CONFIG, CONFIG, CONFIG.replace("updates: 4", "updates: 2")):
        with folder.open(config, resume=False):
            folder.metrics.touch()
            assert folder.config.read_text() == config


@pytest.mark.parametrize(
    "kept", ["metrics.discarded.jsonl", "checkpoints/step_000001/x", "rollouts/step_000001.0-of-1.jsonl.gz"]
)
def test_what_was_paid_for_protects_its_config(folder: RunFolder, kept: str) -> None:
    with folder.open(CONFIG, resume=False):
        write_atomic(folder.root / kept, "x")
    with pytest.raises(RunFolderError, match=r"train\.updates: 4 there, 2 now"):
        folder.check(CONFIG.replace("updates: 4", "updates: 2"), resume=True)


def test_rewind_sets_later_steps_aside(folder: RunFolder) -> None:
    finished(folder)
    rows = [json.dumps({"step": step, "loss": step / 10}) + "\n" for step in range(5)]
    cut = '{"step": 5, "lo'
    folder.metrics.write_text("".join(rows) + cut)
    folder.rollouts.mkdir()
    for step in (2, 3):
        (folder.rollouts / f"step_{step:06d}.0-of-1.jsonl.gz").write_bytes(b"x")

    assert rewind(folder, step=2) == Rewound(later=3)

    assert folder.metrics.read_text() == "".join(rows[:3])
    assert folder.discarded_metrics.read_text() == "".join(rows[3:]) + cut + "\n"
    assert [path.name for path in folder.rollouts.glob("*.gz")] == ["step_000002.0-of-1.jsonl.gz"]
    assert (folder.rollouts / "discarded" / "step_000003.0-of-1.jsonl.gz").exists()


def test_rewind_of_a_run_that_is_not_ahead_changes_nothing(folder: RunFolder) -> None:
    finished(folder)
    folder.metrics.write_text('{"step": 0}\n{"step": 1}\n')
    assert rewind(folder, step=1) == Rewound()
    assert folder.metrics.read_text() == '{"step": 0}\n{"step": 1}\n'
    assert not folder.discarded_metrics.exists()


@pytest.mark.parametrize(
    ("damaged", "lost", "moved"),
    [
        (b'{"step": 1}\n{"step": 2}\n', (0,), 0),
        (b'{"step": 0}\n{"step": 1\n{"step": 2}\n', (1,), 1),
        (b'{"step": 0}\n\xff\xfe\n{"step": 2}\n', (1,), 1),
        (b'{"step": 0}\n{"step": 2}\n{"step": 2}\n', (1,), 1),
        (b'{"step": 0}\n{"stop": 1}\n{"step": 2}\n', (1,), 1),
        (b'{"step": 0}\n{"step": "1"}\n{"step": 2}\n', (1,), 1),
        (b'{"step": 0}\n[1]\n' + b"[" * 100_000 + b"\n", (1, 2), 2),
        (b"", (0, 1, 2), 0),
    ],
)
def test_rows_that_are_lost_are_said_and_damaged_lines_kept_aside(
    folder: RunFolder, damaged: bytes, lost: tuple[int, ...], moved: int
) -> None:
    finished(folder)
    folder.metrics.write_bytes(damaged)
    found = rewind(folder, step=2)
    assert found == Rewound(later=0, damaged=moved, missing=lost)
    rows = [json.loads(line)["step"] for line in folder.metrics.read_text().splitlines()]
    assert rows == [step for step in range(3) if step not in lost]
    aside = folder.discarded_metrics.read_bytes() if folder.discarded_metrics.exists() else b""
    assert aside.count(b"\n") == moved
    assert any("has lost the rows of steps" in line for line in found.remarks(folder))
    assert rewind(folder, step=2) == Rewound(missing=lost)


def test_rows_in_another_order_are_put_in_order(folder: RunFolder) -> None:
    finished(folder)
    folder.metrics.write_bytes(b'{"step": 2}\n{"step": 0}\n{"step": 1}\n')
    assert rewind(folder, step=2) == Rewound()
    assert folder.metrics.read_bytes() == b'{"step": 0}\n{"step": 1}\n{"step": 2}\n'


def test_steps_are_told_as_ranges() -> None:
    assert ranges([0, 3, 4, 5, 9]) == "0, 3-5, 9"


@pytest.mark.parametrize(
    "name", ["step_x.0-of-1.jsonl.gz", "step_000009 (copy).0-of-1.jsonl.gz", "step_.jsonl.gz"]
)
def test_files_among_the_rollouts_that_no_run_wrote_stay(folder: RunFolder, name: str) -> None:
    finished(folder)
    write_atomic(folder.rollouts / name, "x")
    rewind(folder, step=1)
    assert [path.name for path in folder.rollouts.iterdir()] == [name]


@pytest.mark.parametrize("name", ["lock", "config.yaml", "metrics.jsonl", "saved", "stopped", "summary.json"])
def test_a_folder_in_place_of_a_file_is_refused_by_its_path(folder: RunFolder, name: str) -> None:
    finished(folder)
    (folder.root / name).unlink(missing_ok=True)
    (folder.root / name).mkdir()
    for attempt in (folder.check, lambda *given: folder.open(*given).__enter__()):
        with pytest.raises(RunFolderError, match=f"runs/demo/{name} is no file"):
            attempt(CONFIG, True)


@pytest.mark.parametrize("name", ["", "checkpoints", "rollouts", "rollouts/discarded", "tensorboard", "logs"])
def test_a_file_in_place_of_a_folder_is_refused_by_its_path(folder: RunFolder, name: str) -> None:
    write_atomic(folder.root / name, "x")
    for attempt in (folder.check, lambda *given: folder.open(*given).__enter__()):
        with pytest.raises(
            RunFolderError, match="is no folder, and the run has a folder there: move it away"
        ):
            attempt(CONFIG, True)


@pytest.mark.parametrize(
    "damage", [None, b"", b"\xff\xfe", b"[1, 2]", b"a: [", b"a: &a [*a", b"12", b"a: !!python/x y"]
)
def test_a_config_that_is_lost_or_damaged_is_refused_by_its_path(
    folder: RunFolder, damage: bytes | None
) -> None:
    finished(folder)
    folder.config.unlink()
    if damage is not None:
        folder.config.write_bytes(damage)
    with pytest.raises(RunFolderError, match=r"runs/demo/config.yaml cannot be read, .* Restore it"):
        folder.check(CONFIG, resume=True)


@pytest.mark.parametrize("damage", [b"", b"\xff", b"x", b"-3", b"1e9"])
def test_a_damaged_note_of_what_was_saved_changes_nothing(folder: RunFolder, damage: bytes) -> None:
    finished(folder)
    (folder.checkpoints / "step_000020").mkdir(parents=True)
    folder.saved.write_bytes(damage)
    folder.check(CONFIG, resume=True)
    assert folder.lost(20) == ""


def test_a_newer_checkpoint_that_is_gone_is_said(folder: RunFolder) -> None:
    finished(folder)
    folder.saved.write_text("30\n")
    assert folder.lost(20) == " (step 30 was saved too, and its checkpoint is gone)"
    assert folder.lost(30) == ""


def test_a_run_of_a_version_without_a_key_continues_at_the_value_it_had(tmp_path: Path) -> None:
    with RunFolder(tmp_path).open(CONFIG, resume=False):
        RunFolder(tmp_path).metrics.write_text("{}\n")
    added = "reward: {name: exact, reasoning: VALUE}\ndata: {template_arguments: {}}\n"
    plain = CONFIG + "reward: {name: exact}\n"
    RunFolder(tmp_path).config.write_text(plain)
    RunFolder(tmp_path).check(CONFIG + added.replace("VALUE", "drop"), resume=True)
    with pytest.raises(RunFolderError, match=r"reward\.reasoning: drop there, keep now"):
        RunFolder(tmp_path).check(CONFIG + added.replace("VALUE", "keep"), resume=True)


def test_so_does_one_whose_sources_named_no_columns(tmp_path: Path) -> None:
    with RunFolder(tmp_path).open(CONFIG, resume=False):
        RunFolder(tmp_path).metrics.write_text("{}\n")
    source = "data: {sources: {a: {files: [a]ADDED}}}\n"
    unnamed = ", columns: {prompt: null}, answer_form: null, where: {}"
    RunFolder(tmp_path).config.write_text(CONFIG + source.replace("ADDED", ""))
    RunFolder(tmp_path).check(CONFIG + source.replace("ADDED", unnamed), resume=True)
    other = CONFIG + source.replace("ADDED", ", columns: {prompt: q}, where: {level: 3}")
    with pytest.raises(RunFolderError) as caught:
        RunFolder(tmp_path).check(other, resume=True)
    assert "data.sources.a.columns.prompt: None there, q now" in str(caught.value)
    assert "data.sources.a.where.level: (absent) there, 3 now" in str(caught.value)
    assert "resume.accept=[data]" in str(caught.value)
    RunFolder(tmp_path).check(other, resume=True, accepted=("data",))


def test_what_a_check_refuses_leaves_the_folder_as_it_was(folder: RunFolder) -> None:
    finished(folder)
    write_atomic(folder.stopped, "1\n")

    def refuse() -> None:
        raise OSError("the data has changed")

    longer = CONFIG.replace("30", "60")
    with pytest.raises(OSError, match="the data has changed"), folder.open(longer, True, check=refuse):
        pytest.fail("opened")
    assert folder.config.read_text() == CONFIG
    assert folder.stopped.exists()


@pytest.mark.parametrize("value", ["2026-11-28", "2026-02-30", "=", "<<", "yes", "1_000"])
def test_texts_that_older_yaml_reads_as_something_else_stay_texts(folder: RunFolder, value: str) -> None:
    config = render({"name": "demo", "models": {"policy": {"path": value}}})
    assert flat_config(config) == {"name": "demo", "models.policy.path": value}


def test_yes_and_on_are_two_values(folder: RunFolder) -> None:
    """YAML 1.1 reads both as true."""
    stops = {name: render({"name": "demo", "stop": [name]}) for name in ("yes", "on")}
    with folder.open(stops["yes"], resume=False):
        folder.metrics.write_text('{"step": 1}\n')
    with pytest.raises(RunFolderError, match=r"stop: \['yes'\] there, \['on'\] now"):
        folder.check(stops["on"], resume=True)
