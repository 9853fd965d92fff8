"""Curves of a study: one panel per method, with the baseline in each."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_troll.observe.charts import COLOURS
from megatron_troll.study.outcomes import survival
from megatron_troll.study.plan import Cell, Study, StudyPlan
from megatron_troll.study.results import RunResult

COLUMNS = 5
BASELINE: dict[str, Any] = {"color": "0.5", "linewidth": 1.2, "linestyle": "--"}


Runs = Sequence[RunResult]


def plot(plan: StudyPlan, setting: str, results: Mapping[Cell, RunResult], path: Path) -> None:
    """Plot held-out success against rollout batches, for the methods of one setting that have runs: a thin
    line per seed and a thick one for their mean."""

    def draw(axes: Axes, runs: Runs, baseline: Runs) -> None:
        for run in runs:
            axes.plot(_curve(run), color=COLOURS[0], alpha=0.35, linewidth=0.8)
        if baseline:
            axes.plot(_mean(baseline), **BASELINE)
        axes.plot(_mean(runs), color=COLOURS[0], linewidth=1.8)

    _panels(plan, setting, results, "held-out success", draw).savefig(_ready(path), facecolor="white")


def plot_survival(plan: StudyPlan, setting: str, results: Mapping[Cell, RunResult], path: Path) -> None:
    """Plot the share of each method's runs that have not collapsed, against rollout batches."""

    def draw(axes: Axes, runs: Runs, baseline: Runs) -> None:
        if baseline:
            axes.step(*_steps(baseline, plan.study), where="post", **BASELINE)
        axes.step(*_steps(runs, plan.study), where="post", color=COLOURS[0], linewidth=1.8)

    _panels(plan, setting, results, "runs not collapsed", draw).savefig(_ready(path), facecolor="white")


def _panels(
    plan: StudyPlan,
    setting: str,
    results: Mapping[Cell, RunResult],
    title: str,
    draw: Callable[[Axes, Runs, Runs], None],
) -> Figure:
    """Figure with one panel per method; `draw` gets its axes, its runs and the baseline's runs."""
    done = [result for cell, result in results.items() if cell.setting == setting]
    by_method = {m: runs for m in plan.methods if (runs := [r for r in done if r.method == m])}
    rows = -(-len(by_method) // COLUMNS)
    figure = Figure(figsize=(2.3 * COLUMNS, 0.6 + 1.8 * rows), dpi=130, layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    baseline = by_method.get(plan.study.baseline or next(iter(plan.methods)), [])
    for axes, (method, runs) in zip(panels, by_method.items()):
        draw(axes, runs, baseline)
        axes.set_title(method, fontsize=9, loc="left")
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(by_method) :]:
        axes.set_axis_off()
    figure.supxlabel("rollout batches")
    figure.supylabel(title)
    return figure


def _ready(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _steps(runs: Runs, study: Study) -> tuple[range, list[float]]:
    shares = survival(runs, study)
    return range(len(shares)), shares


def _curve(run: RunResult) -> list[float]:
    """Held-out success from the warm start on; NaN if a step has none."""
    return [run.before, *(float("nan") if value is None else value for value in run.held_out)]


def _mean(runs: Runs) -> np.ndarray:
    return np.nanmean([_curve(run) for run in runs], axis=0)
