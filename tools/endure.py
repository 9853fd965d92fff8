"""Kill runs at random moments and damage their files, and compare what they end with against a plain run.

    python tools/endure.py FOLDER [--kills 60] [--damages 120] [--minutes M] [--seed 0]

A plain run of the demo is the measure. A kill ends a rank, the launcher, a helper process or all of them at
a random moment; the run is then continued until it ends. A damage changes one file of a stopped run
(truncated, a bit flipped, deleted, emptied, a folder in its place) or a prompt file, and the run is continued
once.
FOLDER/endure.jsonl has a line per trial and is continued by the next call; the summary is printed as JSON.
A trial is

    equal     the same metrics and rollouts as the plain run
    refused   an exit code other than 0 with one message, and nothing changed
    wrong     anything else: other figures, a traceback, a run that cannot be continued

with the processes, shared memory and temporary folders that were left. Exits with 1 if a trial is wrong or
leaves anything.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_troll.observe.rollouts import read_step

STEPS = 5
CONFIG = f"""
extends: {{examples}}/cpu_troll.yaml
models: {{{{policy: {{{{path: runs/warm/hf}}}}}}}}
rollout: {{{{prompts: 8, samples: 4, staleness: 1}}}}
objective: {{{{correction: {{{{name: tis}}}}}}}}
train: {{{{steps: {STEPS}, updates: 2}}}}
evaluation: {{{{every: 2, prompts: 16}}}}
checkpoint: {{{{every: 1, export: false, asynchronous: true}}}}
"""
TIMED = ("seconds", "tokens_per_s", "mfu")
TARGETS = ("rank", "launcher", "helper", "all")
DAMAGES = ("truncated", "bit flipped", "deleted", "emptied", "folder in its place", "prompts changed")
LIMIT_S = 300.0
SETTLE_S = 5.0


@dataclass(frozen=True)
class Trial:
    """One change to a run and its outcome. `codes`: exit codes of the commands; `left`: processes,
    shared memory and folders that remained; `said`: the last lines of a command that failed."""

    kind: str
    detail: str
    outcome: str
    codes: list[int]
    left: list[str]
    said: str


class Bench:
    """A folder with the demo, a warm-started model and the plain run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.record = root / "endure.jsonl"
        self.environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}

    def prepare(self) -> None:
        """Make what is missing. Raises CalledProcessError."""
        self.root.mkdir(parents=True, exist_ok=True)
        examples = Path(__file__).parents[1] / "examples" / "configs"
        (self.root / "run.yaml").write_text(CONFIG.format(examples=examples))
        if not (self.root / "runs" / "demo").exists():
            self.command("demo", "runs/demo").check_returncode()
        if not (self.root / "runs" / "warm" / "hf").exists():
            short = ("name=warm", "sft.steps=30", "evaluation.prompts=16")
            self.command("sft", str(examples / "cpu_warm_start.yaml"), *short).check_returncode()
        if not (self.run("plain") / "summary.json").exists():
            self.command("train", "run.yaml", "name=plain", "resume=true").check_returncode()
        if not self.run("stopped").exists():
            half = ("train", "run.yaml", "name=stopped", f"train.steps={STEPS - 2}")
            self.command(*half).check_returncode()

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "megatron_troll.cli", *arguments]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. Raises TimeoutExpired after LIMIT_S."""
        return subprocess.run(
            self.argv(*arguments),
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )

    def ended_like_plain(self, name: str) -> str | None:
        """The difference of a finished run from the plain one; None if there is none."""
        if metrics(self.run(name)) != metrics(self.run("plain")):
            return "other metrics"
        for step in range(1, STEPS + 1):
            mine, plain = (samples(self.run(one), step) for one in (name, "plain"))
            if mine != plain:
                return f"other rollouts in step {step}"
        return None


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.split("/")[0] not in TIMED} for row in rows]


def samples(run: Path, step: int) -> list[tuple[object, ...]]:
    return sorted((one.prompt, one.sample, one.tokens, one.logp, one.reward) for one in read_step(run, step))


def kill(bench: Bench, chance: random.Random, number: int) -> Trial:
    """Start a run, kill one of its processes, and continue it until it has ended."""
    name, target = f"kill_{number}", TARGETS[number % len(TARGETS)]
    shutil.rmtree(bench.run(name), ignore_errors=True)
    before, codes = remains(bench), []
    process = subprocess.Popen(
        bench.argv("train", "run.yaml", f"name={name}"),
        cwd=bench.root,
        env=bench.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    moment = chance.uniform(2.0, plain_seconds(bench))
    with_limit = time.monotonic() + moment
    while time.monotonic() < with_limit and process.poll() is None:
        time.sleep(0.05)
    victim = strike(process, target, chance)
    codes.append(process.wait(LIMIT_S))
    wait_for_ranks(bench)
    done = bench.command("train", "run.yaml", f"name={name}", "resume=true")
    codes.append(done.returncode)
    trouble = last_lines(done) if done.returncode else bench.ended_like_plain(name)
    left = sorted(set(remains(bench)) - set(before))
    shutil.rmtree(bench.run(name), ignore_errors=True)
    outcome = "wrong" if trouble else "equal"
    return Trial("kill", f"{target} ({victim}) after {moment:.1f} s", outcome, codes, left, trouble or "")


def plain_seconds(bench: Bench) -> float:
    """Seconds from the first to the last line of the plain run, and the start before them."""
    summary = json.loads((bench.run("plain") / "summary.json").read_text())
    return 15.0 + float(summary["seconds"])


def strike(process: subprocess.Popen[bytes], target: str, chance: random.Random) -> str:
    """Kill processes of a run and name them; '' if it had ended."""
    if process.poll() is not None:
        return ""
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if child.ppid() == process.pid]
    helpers = [child for child in children if child.ppid() != process.pid]
    victims = {
        "rank": ranks and [chance.choice(ranks)],
        "launcher": [psutil.Process(process.pid)],
        "helper": helpers and [chance.choice(helpers)],
        "all": [psutil.Process(process.pid), *children],
    }[target]
    victims = victims or [psutil.Process(process.pid)]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    return f"{len(victims)} of {1 + len(children)} processes"


def damage(bench: Bench, chance: random.Random, number: int) -> Trial:
    """Change one file of a stopped run, and continue it once."""
    name, how = f"damage_{number}", DAMAGES[number % len(DAMAGES)]
    shutil.rmtree(bench.run(name), ignore_errors=True)
    shutil.copytree(bench.run("stopped"), bench.run(name), symlinks=True)
    before = remains(bench)
    prompts = bench.root / "prompts.jsonl"
    shutil.copy(bench.run("demo") / "data" / "train.jsonl", prompts)
    if how == "prompts changed":
        file = bench.run("demo") / "data" / "train.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(lines[1:]))
    else:
        kept = [p for p in sorted(bench.run(name).rglob("*")) if p.is_file() and p.stat().st_size]
        file = chance.choice(kept)
        change(file, how, chance)
    try:
        done = bench.command("train", "run.yaml", f"name={name}", "resume=true")
    finally:
        shutil.copy(prompts, bench.run("demo") / "data" / "train.jsonl")
    said = last_lines(done)
    if done.returncode:
        outcome = "wrong" if "Traceback" in done.stderr else "refused"
    else:
        trouble = bench.ended_like_plain(name)
        outcome, said = ("wrong", trouble) if trouble else ("equal", "")
    left = sorted(set(remains(bench)) - set(before))
    where = file.relative_to(bench.root)
    shutil.rmtree(bench.run(name), ignore_errors=True)
    return Trial("damage", f"{how}: {where}", outcome, [done.returncode], left, said)


def change(file: Path, how: str, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(data[: chance.randrange(len(data))])
    elif how == "bit flipped":
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
    elif how == "emptied":
        file.write_bytes(b"")
    else:
        file.unlink()
        if how == "folder in its place":
            file.mkdir()


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(done.stderr.strip().splitlines()[-3:])[-600:]


def remains(bench: Bench) -> list[str]:
    """Processes that work in the folder, segments of shared memory, and temporary folders of ours."""
    end = time.monotonic() + SETTLE_S
    while True:
        found = [f"process {p.pid} {p.name()}" for p in working_in(bench.root)]
        if not found or time.monotonic() > end:
            break
        time.sleep(0.2)
    found += [str(path) for path in Path("/dev/shm").glob("*")]
    return found + [str(path) for path in Path(tempfile.gettempdir()).glob("mtroll-*")]


def wait_for_ranks(bench: Bench) -> None:
    """Wait until the ranks of a killed launcher have saved and ended, as they do when it dies."""
    end = time.monotonic() + LIMIT_S
    while working_in(bench.root) and time.monotonic() < end:
        time.sleep(0.2)


def working_in(root: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == root and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def summary(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    by_kind = {}
    for kind in ("kill", "damage"):
        mine = [trial for trial in trials if trial["kind"] == kind]
        by_kind[kind] = dict(Counter(trial["outcome"] for trial in mine))
    left = sum(bool(trial["left"]) for trial in trials)
    return {**by_kind, "left something": left}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--damages", type=int, default=120)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after these")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bench = Bench(arguments.folder.absolute())
    bench.prepare()
    lines = bench.record.read_text().splitlines() if bench.record.exists() else []
    trials = [json.loads(line) for line in lines]
    end = time.monotonic() + 60 * arguments.minutes
    wanted = [("kill", arguments.kills), ("damage", arguments.damages)]
    for kind, count in wanted:
        done = sum(trial["kind"] == kind for trial in trials)
        for number in itertools.takewhile(lambda _: time.monotonic() < end, range(done, count)):
            chance = random.Random(f"{arguments.seed} {kind} {number}")
            trial = asdict((kill if kind == "kill" else damage)(bench, chance, number))
            trials.append(trial)
            with open(bench.record, "a") as record:
                record.write(json.dumps(trial) + "\n")
            print(
                f"{kind} {number}: {trial['outcome']}  {trial['detail']}  {trial['said'][-200:]}", flush=True
            )
    print(json.dumps(summary(trials)))
    return int(any(trial["outcome"] == "wrong" or trial["left"] for trial in trials))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
