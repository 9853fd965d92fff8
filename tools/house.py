"""Measure the structure of the package: python tools/house.py [CHECKOUT ...], one after the other.

room      a folder or file directly in megatron_troll/, and troll_kernels
layers    lines of the import-linter contract
arrows    pairs of rooms in which one imports the other, anywhere in its files
imports   import statements of the package's own modules per 1,000 lines (relative, dotted and re-exports too)
records   classes that carry a prompt from the data set to the loss, listed in RECORDS
calls     calls from the entry of `mtroll train` on a rank to its first training step (of this checkout only)
"""

import ast
import os
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

PACKAGE, KERNELS = "megatron_troll", "troll_kernels"
RECORDS = (
    *("Prompt", "Request", "Completion", "Rollout", "BatchFuture", "RolloutBatch", "ScoredBatch"),
    *("AdvantageEstimate", "PlannedStep", "MicroBatch", "HeadOutputs", "ObjectiveInputs", "Policy", "Term"),
    "LossTerms",
)
SMALL = 40


@dataclass(frozen=True)
class Imported:
    """An import statement of `file` that imports `module`, one of our own modules."""

    file: Path
    module: str


class House:
    """The product code of one checkout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.parents = {PACKAGE: root, KERNELS: root / "kernels"}

    @cached_property
    def files(self) -> list[Path]:
        return [path for top, parent in self.parents.items() for path in sorted((parent / top).rglob("*.py"))]

    @property
    def lines(self) -> int:
        return sum(count(path) for path in self.files)

    @property
    def test_lines(self) -> int:
        return sum(count(path) for path in (self.root / "tests").rglob("*.py"))

    def name(self, file: Path) -> str:
        """The dotted name of a module."""
        top, parent = next((top, p) for top, p in self.parents.items() if (p / top) in file.parents)
        parts = file.relative_to(parent / top).with_suffix("").parts
        return ".".join([top, *(part for part in parts if part != "__init__")])

    @cached_property
    def names(self) -> set[str]:
        return {self.name(path) for path in self.files}

    @cached_property
    def statements(self) -> list[Imported]:
        return [found for path in self.files for found in self._imports(path)]

    def _imports(self, file: Path) -> Iterator[Imported]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(file, node)
                inside = [f"{base}.{alias.name}" for alias in node.names]
                # `from package import module` imports the module.
                modules = [m for m in inside if m in self.names] or [base]
            else:
                continue
            ours = [m for m in modules if m.split(".")[0] in (PACKAGE, KERNELS)]
            yield from (Imported(file, module) for module in ours)

    def _absolute(self, file: Path, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name(file).split(".")
        depth = node.level - (1 if file.name == "__init__.py" else 0)
        return ".".join([*package[: len(package) - depth], *([node.module] if node.module else [])])

    @property
    def rooms(self) -> set[str]:
        return {room(name) for name in self.names} - {PACKAGE}

    @property
    def arrows(self) -> set[tuple[str, str]]:
        pairs = {(room(self.name(found.file)), room(found.module)) for found in self.statements}
        return {(one, other) for one, other in pairs if one != other and PACKAGE not in (one, other)}

    @property
    def layers(self) -> int:
        project = tomllib.loads((self.root / "pyproject.toml").read_text())
        return len(project["tool"]["importlinter"]["contracts"][0]["layers"])

    @property
    def records(self) -> int:
        """The number of RECORDS that the package defines."""
        classes = {
            n.name
            for f in self.files
            for n in ast.walk(ast.parse(f.read_text()))
            if isinstance(n, ast.ClassDef)
        }
        return len(classes & set(RECORDS))

    @property
    def small(self) -> float:
        """The share of modules under SMALL lines, without __init__.py."""
        lengths = [count(path) for path in self.files if path.name != "__init__.py"]
        return sum(length < SMALL for length in lengths) / len(lengths)


def count(path: Path) -> int:
    return len(path.read_text().splitlines())


def room(module: str) -> str:
    """megatron_troll.mcore.head -> mcore; troll_kernels.exact -> troll_kernels."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else parts[0]


def calls_to_the_step() -> int:
    """Run `mtroll train` on the demo as rank 0 of one, up to its first training step, and count the package's
    frames between `main` and the step."""
    from megatron_troll import loop
    from megatron_troll.cli.main import main
    from megatron_troll.data.demo import write_demo

    depths: list[int] = []

    @contextmanager
    def opened(*_: object) -> Iterator[Any]:
        state = SimpleNamespace(step=0, before=0.0)
        session = SimpleNamespace(stopping=lambda: False)
        yield SimpleNamespace(resume=lambda: state, session=session)

    def step(*_: object) -> None:
        frame, depth = sys._getframe(1), 1
        while frame.f_code is not main.__code__:
            depth += f"/{PACKAGE}/" in frame.f_code.co_filename
            assert frame.f_back is not None
            frame = frame.f_back
        depths.append(depth)
        raise OSError("counted")

    with tempfile.TemporaryDirectory() as folder, patch.multiple(loop, open_run=opened, train_step=step):
        write_demo(folder, 0)
        settings = [
            f"models.policy.path={folder}/base",
            "models.policy.init=random",
            f"data.files=[{folder}/data/train.jsonl]",
            f"data.held_out=[{folder}/data/held_out.jsonl]",
            f"runs={folder}/runs",
        ]
        with patch.dict(os.environ, RANK="0"):
            main(["train", "examples/configs/cpu_troll.yaml", *settings])
    return depths[0]


def figures(house: House) -> dict[str, str]:
    imports = len(house.statements)
    return {
        "rooms": str(len(house.rooms)),
        "layers": str(house.layers),
        "arrows between rooms": str(len(house.arrows)),
        "own imports": str(imports),
        "own imports per 1,000 lines": f"{1000 * imports / house.lines:.1f}",
        "modules": str(len(house.files)),
        "modules under 40 lines": f"{house.small:.0%}",
        "record types from prompt to loss": str(house.records),
        "lines of product": str(house.lines),
        "lines of tests": str(house.test_lines),
    }


if __name__ == "__main__":
    for root in sys.argv[1:] or ["."]:
        for k, v in figures(House(Path(root))).items():
            print(k, v)
    if sys.argv[1:] in ([], ["."]):
        print("calls from the entry to the training step", calls_to_the_step())
