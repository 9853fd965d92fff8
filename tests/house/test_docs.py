"""The documentation is true: commands parse, files exist, examples load, nothing is left to do."""

import json
import re
from pathlib import Path

import bench_tables
import pytest
import sparse_error_page

from megatron_troll.cli.main import parser
from megatron_troll.config import Config, Layout, known_methods
from megatron_troll.config.load import dump, load
from megatron_troll.data.demo import DEMONSTRATIONS, WARM
from megatron_troll.data.schemas import SCHEMAS
from megatron_troll.objectives.compose import compose
from megatron_troll.observe import fields
from megatron_troll.observe.run_folder import RunFolder
from megatron_troll.rewards.terms import resolve
from tests.house.markdown import PAGES, ROOT, anchors, commands, configurations, inline_code, links
from tools import config_reference

GENERATED = {"metrics.md": fields.markdown, "configuration.md": config_reference.markdown}
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
OF_MAKE_TRAIN = re.findall(r"mtroll \w+ (examples/\S+\.yaml)", (ROOT / "Makefile").read_text())
PYTHONS = (".venv/bin/python", ".venv-nemo/bin/python")
TREES = ("megatron_troll/", "kernels/", "tests/", "tools/", "examples/", "docs/")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pages
def test_every_command_is_understood(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a page are taken in order: what one makes, the next may read."""
    monkeypatch.chdir(ROOT)
    runs: dict[str, Config] = {f"runs/{config.name}": config for config in map(load, OF_MAKE_TRAIN)}
    for words in commands(page):
        if words[0] == "make":
            assert set(words[1:]) <= TARGETS, words
        elif words[0] == "mtroll":
            check_mtroll(words[1:], runs, tmp_path)
        elif words[1:3] == ["-m", "pytest"]:
            assert all((ROOT / path).exists() for path in words[3:]), words
        else:
            script = words[1] if words[0] in PYTHONS else words[0]
            assert (ROOT / script).is_file(), words


def check_mtroll(words: list[str], runs: dict[str, Config], place: Path) -> None:
    """Parse as the command line does, resolve what the command reads, and add the run it makes to `runs`."""
    arguments = parser().parse_args(words)
    if words[0] in ("train", "sft", "eval"):
        source = arguments.config
        if source in runs:
            (place / "config.yaml").write_text(dump(runs[source]))
            source = place / "config.yaml"
        config = load(source, arguments.overrides)
        runs[f"{config.runs}/{config.name}"] = config
    elif words[0] == "launch":
        load(arguments.config, arguments.overrides)
    elif words[0] == "report":
        assert set(arguments.runs) <= runs.keys(), words
    elif words[0] == "rollouts":
        assert arguments.run_folder in runs, words


@pages
def test_every_example_configuration_loads(page: Path, tmp_path: Path) -> None:
    for config in configurations(page, tmp_path):
        if page.name != "extending.md":  # its methods are files of that page: test_extending.py
            compose(config.objective)
            resolve(config.reward)


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


def test_measured_tables_are_those_of_their_files() -> None:
    texts = [page.read_text() for page in bench_tables.PAGES]
    assert [bench_tables.page(text) for text in texts] == texts, "run tools/bench_tables.py"
    files = {file for text in texts for _, file, _ in bench_tables.BLOCK.findall(text)}
    assert files == {path.name for path in (ROOT / "docs").glob("bench_*.json")}


def test_the_errors_of_sparsifying_are_those_of_their_file() -> None:
    text = sparse_error_page.PAGE.read_text()
    found = json.loads(sparse_error_page.RECORD.read_text())
    assert sparse_error_page.page(text, found) == text, "run tools/sparse_error.py"


def test_the_demo_is_described_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rl, warm = load("examples/configs/cpu_troll.yaml"), load("examples/configs/cpu_warm_start.yaml")
    assert warm.sft
    text = (ROOT / "docs" / "first-run.md").read_text()
    assert f"{warm.sft.steps} supervised steps on {WARM * DEMONSTRATIONS:,} demonstrations" in text
    batch = f"{rl.rollout.prompts} prompts x {rl.rollout.samples} answers"
    assert f"{rl.train.steps} rollout batches of RL: {batch}, {rl.train.updates} optimizer steps each" in text


def test_every_file_of_a_run_is_explained() -> None:
    folder = RunFolder(Path("run"))
    names = {
        getattr(folder, name).name for name, kind in vars(RunFolder).items() if isinstance(kind, property)
    }
    text = (ROOT / "docs" / "first-run.md").read_text()
    assert [name for name in names if name not in text] == []


def test_every_verifier_and_schema_is_explained() -> None:
    text = (ROOT / "docs" / "data.md").read_text()
    names = [*known_methods("megatron_troll.rewards.verifiers"), *SCHEMAS]
    assert [name for name in names if f"| `{name}` |" not in text] == []


def test_every_axis_is_explained() -> None:
    text = (ROOT / "docs" / "layouts.md").read_text()
    assert [axis for axis in Layout.model_fields if f"| `{axis}` |" not in text] == []
