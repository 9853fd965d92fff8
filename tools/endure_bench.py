"""A folder with the runs that tools/endure.py does things to, and what it compares them with."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from megatron_troll.observe.rollouts import read_step
from megatron_troll.observe.run_folder import RunFolderError
from megatron_troll.system import end_with_parent

ROOT = Path(__file__).parents[1]
STEPS, STOPPED_AFTER, PROMPTS, SAMPLES = 5, 3, 8, 4
TRAIN = f"""
rollout: {{prompts: {PROMPTS}, samples: {SAMPLES}, staleness: 1}}
objective: {{correction: {{name: tis}}}}
train: {{steps: {STEPS}, updates: 2}}
evaluation: {{every: 2, prompts: 16}}
checkpoint: {{every: 1, export: false, asynchronous: true}}
"""
LOCAL = f"""
extends: {ROOT}/examples/configs/cpu_troll.yaml
models: {{policy: {{path: runs/warm/hf}}, reference: {{path: runs/demo/base}}}}
data: {{files: [data/train.jsonl], held_out: [data/held_out.jsonl]}}
{TRAIN}
"""
SERVED = f"""
extends: {ROOT}/examples/configs/cpu_sglang.yaml
name: served
models: {{policy: {{path: runs/demo/base, init: random}}}}
data: {{files: [data/train.jsonl], held_out: [data/held_out.jsonl]}}
serve: {{python: {ROOT}/.venv-sglang/bin/python}}
{TRAIN}
"""
ONE_RANK = ("launch.ranks=1", "models.policy.layout={tp: 1, ep: 1}")
TIMED = ("seconds", "tokens_per_s", "mfu")
# Files of a run that say nothing of its results and change whenever it is continued.
FLEETING = ("logs", "heartbeat", "lock", "config.yaml")
LIMIT_S, SETTLE_S = 300.0, 5.0


@dataclass(frozen=True)
class Trial:
    """One thing done to a run, and its outcome. codes: exit codes of the commands; left: what remained of
    their processes; said: why it is wrong or was refused."""

    detail: str
    outcome: str
    codes: list[int]
    left: list[str] = field(default_factory=list)
    said: str = ""


@dataclass(frozen=True)
class Done:
    """The exit code and the output of a command."""

    code: int
    text: str

    @property
    def last(self) -> str:
        return "\n".join(self.text.strip().splitlines()[-3:])[-600:]


class Bench:
    """A folder with the demo's data, a warm-started model, a finished run `plain` of two ranks, a run
    `stopped` of one rank, and what that ends with if nothing happens to it, `continued`."""

    def __init__(self, root: Path) -> None:
        self.root, self.record = root, root / "endure.jsonl"
        kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        self.environment = kept | {"TMPDIR": str(root / "tmp")}

    def prepare(self) -> None:
        """Make what is missing. Raises RuntimeError if a command fails."""
        (self.root / "tmp").mkdir(parents=True, exist_ok=True)
        (self.root / "run.yaml").write_text(LOCAL)
        (self.root / "served.yaml").write_text(SERVED)
        if not (self.root / "data").exists():
            self.succeed("demo", "runs/demo")
            shutil.copytree(self.run("demo") / "data", self.root / "data")
        if not (self.run("warm") / "hf").exists():
            warm = str(ROOT / "examples" / "configs" / "cpu_warm_start.yaml")
            self.succeed("sft", warm, "name=warm", "sft.steps=30", "evaluation.prompts=16")
        if not (self.run("plain") / "summary.json").exists():
            self.succeed("train", "run.yaml", "name=plain", "resume=true")
        if not (self.run("stopped") / "summary.json").exists():
            steps = f"train.steps={STOPPED_AFTER}"
            self.succeed("train", "run.yaml", "name=stopped", "resume=true", *ONE_RANK, steps)
        if not (self.run("continued") / "summary.json").exists():
            self.copy_stopped("continued")
            self.succeed(*self.continuing("continued"))

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def copy_stopped(self, name: str) -> Path:
        shutil.rmtree(self.run(name), ignore_errors=True)
        shutil.copytree(self.run("stopped"), self.run(name))
        return self.run(name)

    def continuing(self, name: str) -> tuple[str, ...]:
        """The command that continues a copy of `stopped`."""
        return ("train", "run.yaml", f"name={name}", "resume=true", *ONE_RANK)

    def start(self, *arguments: str, output: str = "output") -> subprocess.Popen[str]:
        """Start a command in a session of its own, that ends with this process; what it says goes to the file
        `output` of FOLDER, which is made anew."""
        with open(self.root / output, "w") as said:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "megatron_troll.cli", *arguments],
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
                text=True,
            )

    def command(self, *arguments: str) -> Done:
        """Run a command to its end. Raises TimeoutExpired after LIMIT_S."""
        code = self.start(*arguments).wait(LIMIT_S)
        return Done(code, (self.root / "output").read_text(errors="replace"))

    def succeed(self, *arguments: str) -> None:
        done = self.command(*arguments)
        if done.code:
            raise RuntimeError(f"{' '.join(arguments)}: exit code {done.code}\n{done.text}")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.split("/")[0] not in TIMED} for row in rows]


def samples(run: Path, step: int) -> list[tuple[object, ...]]:
    """The rollouts of a step. Raises RunFolderError."""
    return sorted((one.prompt, one.sample, one.tokens, one.logp, one.reward) for one in read_step(run, step))


def difference(run: Path, expected: Path, steps: Sequence[int], said: str = "", file: str = "") -> str:
    """The first difference of a run from `expected` in its rows and rollouts of `steps`; "" if there is none.
    A difference is no matter if `file` is in what the run or the reader of the rollouts said."""
    rows, wanted = ({row["step"]: row for row in metrics(one)} for one in (run, expected))
    for step in steps:
        if rows.get(step) != wanted[step] and not (file and file in said):
            return f"other metrics in step {step}"
        if step == 0:
            continue
        try:
            if samples(run, step) != samples(expected, step):
                return f"other rollouts in step {step}"
        except RunFolderError as error:
            # The reader names the file, or the step whose file is gone.
            if not file or not (file in str(error) or file.startswith(f"step_{step:06d}")):
                return str(error)
    return ""


def snapshot(run: Path) -> dict[str, str]:
    """A hash of each file of a run but the FLEETING ones."""
    files = (path for path in sorted(run.rglob("*")) if path.relative_to(run).parts[0] not in FLEETING)
    return {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in files
    }


def remains(bench: Bench) -> list[str]:
    """Processes that work in the folder, shared memory that no process has mapped, and temporary folders.
    Waits up to SETTLE_S for processes that are ending."""
    end = time.monotonic() + SETTLE_S
    while (found := working_in(bench.root)) and time.monotonic() < end:
        time.sleep(0.2)
    left = [f"process {process.pid} {process.name()}" for process in found]
    mapped = "".join(_maps())
    left += [str(path) for path in Path("/dev/shm").glob("*") if str(path) not in mapped]
    return left + [str(path) for path in (bench.root / "tmp").iterdir()]


def working_in(root: Path) -> list[psutil.Process]:
    """The processes whose working folder is `root`, but this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == root and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _maps() -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/maps"):
        try:
            yield path.read_text()
        except OSError:  # it has ended
            continue
