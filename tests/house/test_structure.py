"""The house keeps its shape: layers, sizes, and words that some rooms must not use."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from tests.house.markdown import ROOT

PACKAGE = ROOT / "megatron_troll"
KERNELS = ROOT / "kernels" / "troll_kernels"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted(path for tree in (PACKAGE, KERNELS) for path in tree.rglob("*.py"))
ALL = [*SOURCES, *sorted(path for tree in ("tests", "tools") for path in (ROOT / tree).rglob("*.py"))]
PURE = [PACKAGE / name for name in ("types.py", "objectives", "advantages")] + [KERNELS]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
LONGER = {"megatron_troll/mcore/transformer_config.py:transformer_config"}  # one call, a line per field


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def below(*roots: Path) -> list[Path]:
    """The sources that are one of `roots` or lie inside."""
    return [path for path in SOURCES if any(path == root or root in path.parents for root in roots)]


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text()))


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def importers(module: str, paths: list[Path]) -> list[str]:
    """The files that import `module` or something inside it."""
    return [
        name_of(path)
        for path in paths
        if any(name == module or name.startswith(module + ".") for name in imports(path))
    ]


def test_the_layer_contracts_are_kept() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_room_has_its_layer() -> None:
    contract = PROJECT["tool"]["importlinter"]["contracts"][0]
    listed = {name.strip() for layer in contract["layers"] for name in layer.split("|")}
    rooms = {path.stem for path in PACKAGE.iterdir() if (path.is_dir() or path.suffix == ".py")}
    rooms -= {"__init__", "__pycache__", "presets"}
    assert listed == {f"megatron_troll.{room}" for room in rooms} | {"troll_kernels"}


def test_the_table_of_the_readme_is_that_of_the_layers() -> None:
    """A row for each layer, from the top."""
    layers = [layer.split("|") for layer in PROJECT["tool"]["importlinter"]["contracts"][0]["layers"]]
    contract = [[name.strip().removeprefix("megatron_troll.") for name in layer] for layer in layers]
    table = (
        (ROOT / "README.md").read_text().split("| room | what it knows |\n|---|---|\n")[1].split("\n\n")[0]
    )
    rows = [re.findall(r"`(\w+)`", row.split("|")[1]) for row in table.splitlines()]
    assert [set(row) for row in rows] == [set(layer) for layer in contract]


def test_only_mcore_imports_megatron() -> None:
    mcore = below(PACKAGE / "mcore")
    assert importers("megatron", [path for path in SOURCES if path not in mcore]) == []
    assert len(importers("megatron", mcore)) > 5


def test_two_modules_ask_for_what_a_machine_without_a_gpu_needs() -> None:
    """One imports Megatron without a compiler, the other patches it."""
    cpu = below(PACKAGE / "mcore" / "cpu")
    outside = [path for path in SOURCES if path not in cpu]
    assert importers("megatron_troll.mcore.cpu", outside) == [
        "megatron_troll/cli/commands.py",
        "megatron_troll/mcore/parallel.py",
    ]


def test_pure_maths_knows_no_process() -> None:
    assert importers("torch.distributed", below(*PURE)) == []


def test_pure_maths_fetches_no_number_from_the_device() -> None:
    fetched = [
        f"{name_of(path)}:{node.lineno}"
        for path in below(*PURE)
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and node.attr in ("item", "cpu", "numpy")
    ]
    assert fetched == []


def test_files_are_small() -> None:
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in ALL}
    assert {name: length for name, length in lengths.items() if length >= MAX_FILE_LINES} == {}


def test_functions_are_small() -> None:
    """LONGER may lose entries, and gains none."""
    lengths = {
        f"{name_of(path)}:{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path in ALL
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name for name, length in lengths.items() if length >= MAX_FUNCTION_LINES} == LONGER
