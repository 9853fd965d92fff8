"""Curves of a study: a panel a method, each seed a thin line, beside the mean of the baseline."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_troll.observe.charts import COLOURS
from megatron_troll.study.plan import Cell, Plan
from megatron_troll.study.results import Result

COLUMNS = 5


def plot(plan: Plan, setting: str, results: Mapping[Cell, Result], path: Path) -> None:
    """Held-out success against rollout batches, for the methods of one setting that have runs."""
    done = [result for cell, result in results.items() if cell.setting == setting]
    by_method = {m: runs for m in plan.methods if (runs := [r for r in done if r.method == m])}
    rows = -(-len(by_method) // COLUMNS)
    figure = Figure(figsize=(2.3 * COLUMNS, 0.6 + 1.8 * rows), dpi=130, layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, COLUMNS, sharex=True, sharey=True, squeeze=False).flatten()
    baseline = by_method.get(plan.study.baseline or next(iter(plan.methods)), [])
    for axes, (method, runs) in zip(panels, by_method.items()):
        _panel(axes, method, runs, baseline)
    for axes in panels[len(by_method) :]:
        axes.set_axis_off()
    figure.supxlabel("rollout batches")
    figure.supylabel("held-out success")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _panel(axes: Axes, method: str, runs: Sequence[Result], baseline: Sequence[Result]) -> None:
    for run in runs:
        axes.plot(_curve(run), color=COLOURS[0], alpha=0.35, linewidth=0.8)
    if baseline:
        axes.plot(_mean(baseline), color="0.5", linewidth=1.2, linestyle="--", label=baseline[0].method)
    axes.plot(_mean(runs), color=COLOURS[0], linewidth=1.8)
    axes.set_title(method, fontsize=9, loc="left")
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(run: Result) -> list[float]:
    """From the warm start on; NaN where there is no figure."""
    return [run.before, *(float("nan") if value is None else value for value in run.held_out)]


def _mean(runs: Sequence[Result]) -> np.ndarray:
    return np.nanmean([_curve(run) for run in runs], axis=0)
