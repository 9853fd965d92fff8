"""Tokens per second of generation in the trainer's processes, beside another build of this project.

    git worktree add ../before COMMIT
    python tools/bench_generation.py MODEL --build ../before [--repeats 3] [--json FILE]

MODEL is a Hugging Face folder (tools/smollm2.py makes one). 128 requests behind prompts of 60 to 100 tokens,
32 at a time: 8 answers to each of 16 prompts, then one to each of 128. An answer ends at every 25th token id,
after 128 tokens at the latest. The builds are processes that take turns; the first turn of each is a warm-up.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bench_record
from bench_peer import ROOT, prompts_of, started
from transformers import AutoTokenizer

WORK = {"16 prompts x 8": (16, 8), "128 prompts x 1": (128, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--build", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    builds = {"before": arguments.build.resolve(), "now": ROOT}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        prompts, settings = Path(folder) / "prompts.json", Path(folder) / "settings.json"
        prompts.write_text(json.dumps(prompts_of(AutoTokenizer.from_pretrained(arguments.model), 128)))
        wanted = {"work": WORK, "tokens": 128, "max_sequences": 32, "stop_every": 25}
        settings.write_text(json.dumps(wanted | {"threads": os.cpu_count()}))
        files = [str(arguments.model), str(prompts), str(settings)]
        program = str(ROOT / "tools" / "peer" / "generation.py")
        sides = {
            name: running.enter_context(
                started(["env", f"PYTHONPATH={build}:{build / 'kernels'}", sys.executable, program, *files])
            )
            for name, build in builds.items()
        }
        turns: dict[str, dict[str, list[dict[str, Any]]]] = {n: {w: [] for w in WORK} for n in sides}
        for turn in range(arguments.repeats + 1):
            for work in WORK:
                for name, process in sides.items():
                    assert process.stdin is not None
                    assert process.stdout is not None
                    assert answer(process.stdout) == {"ready": True}
                    process.stdin.write(work + "\n")
                    process.stdin.flush()
                    found = answer(process.stdout)
                    print(f"{name}, {work}: {found}", flush=True)
                    if turn:
                        turns[name][work].append(found)
    rows = [row_of(work, turns) for work in WORK]
    for row in rows:
        print(f"{row['work']}: {row['before']:.1f} -> {row['now']:.1f} tokens/s, {row['ratio']:.2f} times")
    if arguments.json is not None:
        bench_record.write(arguments.json, bench_record.record("cpu", rows))
    return 0


def answer(lines: Any) -> dict[str, Any]:
    """The next JSON line of a side. Raises RuntimeError if it has ended."""
    for line in lines:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError("a side ended")


def row_of(work: str, turns: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    medians = {
        name: statistics.median(turn["tokens_per_s"] for turn in of_side[work])
        for name, of_side in turns.items()
    }
    return {
        "work": work,
        **medians,
        "ratio": medians["now"] / medians["before"],
        "turns": {n: of_side[work] for n, of_side in turns.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
