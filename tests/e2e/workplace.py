"""A folder to work in and the `mtroll` command, as real processes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 300.0
TIMINGS = ("seconds", "tokens_per_s", "mfu")


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, and the lines of stderr."""

    code: int
    out: str
    err: list[str]


@dataclass(frozen=True)
class Workplace:
    """Commands run in `root`; runs are in root/runs. `package` is the folder that holds the package."""

    root: Path
    package: Path = REPOSITORY

    def mtroll(self, *arguments: str) -> Done:
        """Run to the end."""
        return finish(self.start(*arguments))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
        }
        return subprocess.Popen(
            [Path(sys.executable).parent / "mtroll", *arguments],
            cwd=self.root,
            env=environment | {"PYTHONPATH": f"{self.package}{os.pathsep}{REPOSITORY}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Rewards (rewards.Overlap) wait until the block ends."""
        hold = self.root / "hold"
        hold.touch()
        try:
            yield
        finally:
            hold.unlink()

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """The rows of a run, [] before the first."""
        path = self.run(name) / "metrics.jsonl"
        if not path.exists():
            return []
        return [
            json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")
        ]


def finish(process: subprocess.Popen[str]) -> Done:
    out, err = process.communicate(timeout=LIMIT_S)
    return Done(process.returncode, out, err.splitlines())


def succeed(done: Done) -> Done:
    assert done.code == 0, "\n".join([*done.err, done.out])
    return done


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until `condition` holds, while `process` runs."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def listening(process: subprocess.Popen[str]) -> set[str]:
    """The addresses at which a command and the processes it started listen now."""
    parent = psutil.Process(process.pid)
    connections = [
        c for one in (parent, *parent.children(recursive=True)) for c in one.net_connections("inet")
    ]
    return {found.laddr.ip for found in connections if found.status == psutil.CONN_LISTEN}


def untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what depends on how busy the machine is."""
    return [{name: value for name, value in row.items() if name.split("/")[0] not in TIMINGS} for row in rows]


def two_steps(place: Workplace, name: str, *settings: str) -> list[dict[str, Any]]:
    """The rows of a run of tiny.yaml with `settings` that takes two steps, each with every update."""
    short = [f"name={name}", "train.steps=2", "checkpoint={every: 0, export: false}"]
    succeed(place.mtroll("train", "tiny.yaml", *short, *settings))
    rows = place.metrics(name)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["skipped_updates"] == 0 for row in rows[1:])
    return rows
