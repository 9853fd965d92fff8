"""Success on the same questions before and after RL, sampled and greedy.

    python tools/lm_report.py runs/lm-before runs/lm-after

The folders are of `mtroll eval`, with the data sets `sampled` and `greedy`. Prints a Markdown table; an
interval is a percentile bootstrap of 95 % over questions, of differences over the same questions.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from megatron_troll.evals.estimators import interval
from megatron_troll.observe.rollouts import read_step

SETS = ("sampled", "greedy")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    before, after = success(arguments.before), success(arguments.after)
    rows = {f"{name}, before": before[name] for name in SETS}
    rows |= {f"{name}, after": after[name] for name in SETS}
    rows["sampled after - sampled before"] = after["sampled"] - before["sampled"]
    rows["sampled after - greedy before"] = after["sampled"] - before["greedy"]
    print(f"| {len(before['sampled']):,} questions | success | 95 % interval |\n|---|---|---|")
    for name, values in rows.items():
        low, high = interval(values[:, None], seed=0)[:, 0]
        print(f"| {name} | {values.mean():.3f} | {low:.3f} to {high:.3f} |")
    return 0


def success(run: Path) -> dict[str, np.ndarray]:
    """Success [prompts] of each question, in the order of their ids, by data set."""
    names = list(json.loads((run / "eval.json").read_text())["sets"])
    found: dict[str, np.ndarray] = {}
    for name in SETS:
        samples = {sample.prompt: sample.reward for sample in read_step(run, names.index(name) + 1)}
        found[name] = np.array([samples[prompt] for prompt in sorted(samples)])
    return found


if __name__ == "__main__":
    sys.exit(main())
