"""Plot the README's figure: held-out success of the demo and its controls over several seeds.

    python tools/plot_demo.py runs/seeds docs/images/curve.png

The folder is what examples/demo_seeds.sh writes: <seed>/<run>. Prints the table that goes with the figure.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_troll.observe.charts import COLOURS
from megatron_troll.observe.runs import RecordedRun, read_run


@dataclass(frozen=True)
class Kind:
    """A kind of run; each seed has one, under the same folder name."""

    folder: str
    label: str
    shade: str


KINDS = (
    Kind("troll", "RL, TROLL", COLOURS[0]),
    Kind("clip", "RL, PPO-clip", COLOURS[1]),
    Kind("more-warm-start", "control: more warm start", COLOURS[2]),
    Kind("shuffled-rewards", "control: RL with shuffled rewards", COLOURS[3]),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Plot the demo's seeds and controls.")
    parser.add_argument("folder", type=Path, help="what examples/demo_seeds.sh wrote: <seed>/<run>")
    parser.add_argument("output", type=Path, help="a PNG file")
    arguments = parser.parse_args(argv)
    seeds = sorted(path for path in arguments.folder.iterdir() if path.is_dir())
    runs = {kind: [read_run(seed / kind.folder, kind.folder) for seed in seeds] for kind in KINDS}
    plot(runs, arguments.output)
    print(table(runs, [seed.name for seed in seeds]))


def plot(runs: dict[Kind, list[RecordedRun]], output: Path) -> None:
    """Plot held-out success against step: a thin line per seed, the mean in bold, training batches faint."""
    figure = Figure(figsize=(8, 4.2), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    last = max(run.rows[-1]["step"] for run in runs[KINDS[0]])
    for kind, of_seeds in runs.items():
        _draw(axes, kind, of_seeds, last)
    title = f"Held-out success, mean of {len(runs[KINDS[0]])} seeds (thin lines)"
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("rollout batches (more warm start: about the same compute)")
    axes.set_ylim(0, 1.03)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(output, facecolor="white")


def _draw(axes: Axes, kind: Kind, runs: Sequence[RecordedRun], last: int) -> None:
    curves = [held_out(run, last) for run in runs]
    for run, (steps, values) in zip(runs, curves, strict=True):
        axes.plot(*run.curve("success"), color=kind.shade, alpha=0.2, linewidth=1)
        axes.plot(steps, values, color=kind.shade, alpha=0.4, linewidth=1)
    means = [mean(values) for values in zip(*(values for _, values in curves), strict=True)]
    axes.plot(curves[0][0], means, color=kind.shade, linewidth=2.5, marker="o", label=kind.label)


def held_out(run: RecordedRun, last: int) -> tuple[list[int], list[float]]:
    """Steps and held-out success. Supervised runs are evaluated only before and after: at 0 and `last`."""
    steps, values = run.curve("held_out_success")
    if len(steps) > 1:
        return steps, values
    return [0, last], [run.summary["held_out_success_before"], run.summary["held_out_success_after"]]


def table(runs: dict[Kind, list[RecordedRun]], seeds: Sequence[str]) -> str:
    """Markdown table of held-out success after training, one column per seed."""
    lines = ["| | " + " | ".join(f"seed {seed}" for seed in seeds) + " |", "|---" * (len(seeds) + 1) + "|"]
    before = [run.summary["held_out_success_before"] for run in runs[KINDS[0]]]
    rows = {"warm start (before)": before} | {
        kind.label: [run.summary["held_out_success_after"] for run in of_seeds]
        for kind, of_seeds in runs.items()
    }
    lines += [
        f"| {label} | " + " | ".join(f"{v:.3f}" for v in values) + " |" for label, values in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
