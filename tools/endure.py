"""Kill runs, fill their disks, damage their files, change their inputs, and compare each to a plain run.

    python tools/endure.py FOLDER [--kills 60] [--disks 12] [--damages 120] [--inputs 12] [--servers 0]
                                  [--minutes M] [--seed 0]

kill     a rank, the launcher, a helper process, all of them, or (with --servers) an SGLang server, killed at
         a random moment; then the run is continued to its end
disk     a file system with too little room or too few inodes for the run; then it gets room, and the run is
         continued (needs root, or `unshare --map-root-user --mount python tools/endure.py ...`)
damage   one file of a stopped run is truncated, emptied, deleted, has a bit flipped or a folder in its place
         (that of a checkpoint, in half of the trials); then the run is continued
input    prompts, held-out prompts, template, tokenizer or stop tokens of a stopped run are changed; then it
         is continued

FOLDER/endure.jsonl gets a line per trial, and the next call goes on after the last one. Outcomes:

    equal     the same metrics and rollouts as a run that nothing happened to
    told      the steps after the damage are the same, and the run or the reader of rollouts names the file
    refused   an exit code other than 0 with a message, and no file of the run has changed
    wrong     anything else: other figures, a traceback, a run that cannot be continued

`left` names processes, shared memory and temporary folders that remain. Exits with 1 if a trial is wrong or
leaves anything.
"""

import argparse
import json
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from endure_bench import Bench, Trial
from endure_trials import change_input, damage, disk, kill, kill_server

KINDS: dict[str, tuple[int, Callable[[Bench, random.Random, int], Trial]]] = {
    "input": (12, change_input),
    "disk": (12, disk),
    "damage": (120, damage),
    "kill": (60, kill),
    "server": (0, kill_server),
}


def summary(trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Trials of each kind by outcome, and how many left something."""
    by_kind = {}
    for kind in KINDS:
        mine = [trial for trial in trials if trial["kind"] == kind]
        by_kind[kind] = dict(Counter(trial["outcome"] for trial in mine))
    return {**by_kind, "left something": sum(bool(trial["left"]) for trial in trials)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    for kind, (count, _) in KINDS.items():
        parser.add_argument(f"--{kind}s", type=int, default=count)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no trial after these")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    bench = Bench(arguments.folder.absolute())
    bench.prepare()
    lines = bench.record.read_text().splitlines() if bench.record.exists() else []
    trials = [json.loads(line) for line in lines]
    end = time.monotonic() + 60 * arguments.minutes
    for kind, (_, run) in KINDS.items():
        done = {trial["number"] for trial in trials if trial["kind"] == kind}
        for number in sorted({*range(getattr(arguments, f"{kind}s"))} - done):
            if time.monotonic() > end:
                break
            began = time.monotonic()
            chance = random.Random(f"{arguments.seed} {kind} {number}")
            trial = {"kind": kind, "number": number, **asdict(run(bench, chance, number))}
            trials.append(trial)
            with open(bench.record, "a") as record:
                record.write(json.dumps(trial) + "\n")
            took = f"{time.monotonic() - began:.0f} s"
            print(
                f"{kind} {number}: {trial['outcome']}, {took}: {trial['detail']} {trial['said']}", flush=True
            )
    print(json.dumps(summary(trials)))
    return int(any(trial["outcome"] == "wrong" or trial["left"] for trial in trials))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
