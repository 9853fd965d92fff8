"""A run folder that was renamed, copied or is opened from elsewhere is still the place of its run."""

import shutil
from pathlib import Path

import pytest

from megatron_troll.config import ConfigError, RunPaths
from megatron_troll.config.load import dump, load
from megatron_troll.observe.opened import load_opened
from megatron_troll.observe.run_folder import RunFolder

CONFIG = "models: {policy: {path: base}}\ntrain: {steps: 3}\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run in runs/first, begun by a file run.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(f"name: first\n{CONFIG}")
    begun(load("run.yaml"))
    return tmp_path


def begun(config: object) -> None:
    assert hasattr(config, "name")
    folder = RunFolder.of(config)  # pyright: ignore[reportArgumentType]
    with folder.open(dump(config), resume=False):  # pyright: ignore[reportArgumentType]
        folder.metrics.write_text('{"step": 0}\n')


def root(given: str | Path, *overrides: str) -> Path:
    """The run folder that a command with these arguments works in."""
    return RunPaths.of(load_opened(given, overrides)).root


def test_a_folder_where_its_config_says_keeps_the_words_of_its_config(place: Path) -> None:
    config = load_opened("runs/first", ["resume=true"])
    assert (config.runs, config.name) == ("runs", "first")
    assert config.train.steps == 3


def test_a_renamed_folder_is_the_place_of_its_run(place: Path) -> None:
    Path("runs/first").rename("runs/5")
    assert root("runs/5", "resume=true") == Path("runs/5")
    assert root("runs/5/config.yaml", "resume=true") == Path("runs/5")
    assert root("run.yaml", "resume=true") == Path("runs/first")


def test_a_copy_on_another_disk_is_the_place_of_its_run(place: Path) -> None:
    shutil.copytree("runs/first", "disk/copy")
    assert root(place / "disk/copy") == place / "disk/copy"
    assert root("runs/first") == Path("runs/first")


def test_a_folder_opened_from_another_working_directory_is_the_place_of_its_run(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert root(place / "runs/first", "resume=true") == place / "runs/first"
    assert root("../runs/first", "resume=true") == Path("../runs/first")
    monkeypatch.chdir(place / "runs/first")
    assert root(".", "resume=true") == place / "runs/first"
    assert root("config.yaml") == place / "runs/first"


def test_a_link_to_a_folder_is_that_folder(place: Path) -> None:
    Path("link").symlink_to("runs/first")
    assert root("link", "resume=true") == Path("runs/first")


def test_a_killed_run_without_any_figures_moves_too(place: Path) -> None:
    Path("runs/first/metrics.jsonl").unlink()
    Path("runs/first").rename("runs/second")
    assert root("runs/second") == Path("runs/second")


def test_a_new_name_is_a_new_run_beside_the_one_that_was_opened(place: Path) -> None:
    assert root("runs/first", "name=other") == Path("runs/other")
    Path("runs/first").rename("runs/second")
    assert root("runs/second", "name=other") == Path("runs/other")
    assert root("runs/second", "runs=/disk") == Path("/disk/second")


def test_a_folder_that_only_holds_a_configuration_is_no_run(place: Path) -> None:
    Path("mine").mkdir()
    Path("mine/config.yaml").write_text(f"name: first\n{CONFIG}")
    assert root("mine") == Path("runs/first")


def test_a_run_folder_without_its_config_is_refused_by_its_path(place: Path) -> None:
    Path("runs/first/config.yaml").unlink()
    with pytest.raises(ConfigError, match=r"runs/first/config.yaml: cannot be read: No such file"):
        load_opened("runs/first", ["resume=true"])
