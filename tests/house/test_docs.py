"""The documentation is true: its commands parse, its files exist, its examples load, nothing is left to do."""

import re
from pathlib import Path

import pytest

from megatron_troll.cli import parser
from megatron_troll.config.load import dump, load
from megatron_troll.config.tree import Config
from megatron_troll.objectives.compose import compose
from megatron_troll.observe import fields
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.rewards.reward import build
from tests.house.markdown import PAGES, ROOT, anchors, blocks, commands, inline_code, links
from tools import config_reference

GENERATED = {"metrics.md": fields.markdown, "configuration.md": config_reference.markdown}
TARGETS = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
TREES = ("megatron_troll/", "kernels/", "tests/", "tools/", "examples/", "docs/")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_every_command_is_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of a page are taken in order: what one writes, the next may read."""
    monkeypatch.chdir(ROOT)
    runs: dict[str, Config] = {}
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= set(TARGETS), words
        elif words[0] == "mtroll":
            check_mtroll(words[1:], runs)
        else:
            assert (ROOT / words[0]).is_file(), words


def check_mtroll(words: list[str], runs: dict[str, Config]) -> None:
    """Parse as the command line does; resolve what the command reads; remember the run it makes."""
    arguments = parser().parse_args(words)
    command = words[0]
    if command in ("train", "sft"):
        config = resolved(arguments.config, arguments.overrides, runs)
        runs[f"{config.runs}/{config.name}"] = config
    elif command in ("report", "rollouts"):
        named = arguments.runs if command == "report" else [arguments.run_folder]
        assert set(named) <= KNOWN_RUNS | runs.keys(), words


# What `make train` leaves.
KNOWN_RUNS = {"runs/demo-warm-start", "runs/cpu-troll"}


def resolved(source: str, overrides: list[str], runs: dict[str, Config]) -> Config:
    if source in runs:
        kept = ROOT / "docs" / ".config.yaml"
        kept.write_text(dump(runs[source]))
        try:
            return load(kept, overrides)
        finally:
            kept.unlink()
    return load(source, overrides)


@pages
def test_every_example_configuration_loads(page: Path) -> None:
    for number, block in enumerate(blocks(page, "yaml")):
        path = ROOT / f".example_{number}.yaml"
        path.write_text(block.text)
        try:
            config = load(path)
        finally:
            path.unlink()
        if "my_" not in block.text.replace("my_run", ""):
            compose(config.objective)
            build(config.reward)


@pages
def test_every_relative_link_resolves(page: Path) -> None:
    for link in links(page):
        if link.startswith(("http:", "https:")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pages
def test_every_named_file_exists(page: Path) -> None:
    named = [code for code in inline_code(page) if code.startswith(TREES) and " " not in code]
    assert [name for name in named if not (ROOT / name).exists()] == []


@pages
def test_nothing_is_left_to_do(page: Path) -> None:
    assert "TODO" not in page.read_text()


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_current(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == GENERATED[name](), f"write docs/{name} again"


def test_every_file_of_a_run_is_explained() -> None:
    folder = RunFolder(Path("run"))
    names = {getattr(folder, name).name for name, kind in vars(RunFolder).items() if isinstance(kind, property)}
    text = (ROOT / "docs" / "first-run.md").read_text()
    assert [name for name in names if name not in text] == []


def test_every_verifier_schema_and_axis_is_explained() -> None:
    data, layouts = ((ROOT / "docs" / name).read_text() for name in ("data.md", "layouts.md"))
    for name in ("exact", "regex", "math_verify", "messages", "dapo", "gsm8k"):
        assert f"| `{name}` |" in data
    for axis in ("tp", "pp", "vpp", "cp", "ep", "etp"):
        assert f"| `{axis}` |" in layouts
