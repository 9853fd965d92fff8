"""The curves that a report shows, and curves.png."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from megatron_troll.observe.runs import RecordedRun

# Okabe and Ito's palette: colour-blind readers can distinguish it on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PNG_PANELS = 4


@dataclass(frozen=True)
class Line:
    """A curve of one field of metrics.jsonl. `sparse`: values at few steps only, shown with markers; `faint`:
    drawn thin and pale."""

    field: str
    label: str
    dashed: bool = False
    sparse: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """One chart. Its y axis starts at 0, or lower if a value is negative, and reaches at least `top`."""

    title: str
    lines: tuple[Line, ...]
    top: float = 0.0

    def shown(self, runs: Sequence[RecordedRun]) -> tuple[Line, ...]:
        """The lines for which at least one run has a value."""
        return tuple(line for line in self.lines if any(run.curve(line.field)[0] for run in runs))

    def span(self, runs: Sequence[RecordedRun]) -> tuple[float, float]:
        """Limits of the y axis, with a little room above the highest value."""
        values = [value for line in self.shown(runs) for run in runs for value in run.curve(line.field)[1]]
        low, high = min(0.0, *values), max(self.top, *values)
        return low, high * 1.03 if high > low else low + 1.0


CHARTS = (
    Chart(
        "Success",
        (
            Line("success", "training batch", faint=True),
            Line("held_out_success", "held out", sparse=True),
        ),
        top=1.0,
    ),
    Chart(
        "KL to the old policy (nats per token)",
        (Line("kl_before", "before projection", dashed=True), Line("kl_after", "after projection")),
    ),
    Chart("Projected tokens (share)", (Line("projected", "projected"),)),
    Chart("Entropy (nats per token)", (Line("entropy", "entropy"),)),
    Chart("Approximate KL of the update (nats per token)", (Line("approx_kl", "k3"),)),
    Chart("Gradient norm", (Line("grad_norm", "gradient norm"),)),
    Chart("Tokens per second", (Line("tokens_per_s", "tokens per second"),)),
    Chart("Response length (tokens)", (Line("response_length", "response length"),)),
    Chart("KL of rollout engine and trainer (nats per token)", (Line("rollout_trainer_kl", "KL"),)),
)


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def write_png(runs: Sequence[RecordedRun], path: Path) -> None:
    """Write the first four charts that have values, success first, at twice their size in a README."""
    charts = [chart for chart in CHARTS if chart.shown(runs)][:PNG_PANELS]
    figure = Figure(figsize=(10, 6.4), dpi=160, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    for place, chart in enumerate(charts, start=1):
        _panel(figure.add_subplot(2, 2, place), chart, runs)
    if len(runs) > 1:
        handles = [Line2D([], [], color=colour(i), lw=2, label=run.name) for i, run in enumerate(runs)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(runs)), frameon=False)
    figure.savefig(path, facecolor="white")


def _panel(axes: Axes, chart: Chart, runs: Sequence[RecordedRun]) -> None:
    lines = chart.shown(runs)
    for index, run in enumerate(runs):
        for line in lines:
            _plot(axes, run, line, colour(index))
    axes.set_title(chart.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylim(chart.span(runs))
    if len(lines) > 1:
        shade = "0.25" if len(runs) > 1 else colour(0)
        handles = [Line2D([], [], **_style(line, shade), label=line.label) for line in lines]
        axes.legend(handles=handles, fontsize=9, frameon=False)


def _plot(axes: Axes, run: RecordedRun, line: Line, shade: str) -> None:
    steps, values = run.curve(line.field)
    axes.plot(steps, values, **_style(line, shade), clip_on=False)


def _style(line: Line, shade: str) -> dict[str, Any]:
    return {
        "color": shade,
        "linestyle": "--" if line.dashed else "-",
        "linewidth": 1.2 if line.faint else 2,
        "alpha": 0.45 if line.faint else 1,
        "marker": "o" if line.sparse else None,
        "markersize": 4,
    }
