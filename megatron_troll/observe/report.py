"""One self-contained HTML page that compares runs, and curves.png beside it."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import plotly.io

from megatron_troll.observe.charts import CHARTS, Chart, Line, colour, write_png
from megatron_troll.observe.runs import RecordedRun, differing_keys, read_runs
from megatron_troll.system import write_atomic

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px }
body { margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
table { border-collapse: collapse }
th, td { padding: .3rem 1.2rem .3rem 0; text-align: left; vertical-align: top }
tr { border-bottom: 1px solid #ddd } td { font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(440px, 100%), 1fr)); gap: 1rem }
.charts > div { min-width: 0 }
"""


def report(runs: Sequence[Path], output: Path) -> None:
    """Write `output` (HTML, about 5 MB: it holds plotly and works offline) and curves.png in its folder.

    Raises NoMetricsError when a folder has no finished step.
    """
    read = read_runs(runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, page(read))
    write_png(read, output.parent / "curves.png")


def page(runs: Sequence[RecordedRun]) -> str:
    """The whole page: summaries, differing keys, curves, versions."""
    figures = [_curves(chart, runs) for chart in CHARTS if chart.shown(runs)] + [_phases(runs)]
    divs = [_div(figure, include_plotly=index == 0) for index, figure in enumerate(figures)]
    title = escape(" / ".join(run.name for run in runs))
    parts = [f"<h1>{title}</h1>", _table(["run", *SUMMARY], [_summary(run) for run in runs])]
    if differing := differing_keys(runs):
        rows = [[key, *map(_text, values)] for key, values in differing.items()]
        parts += ["<h2>Where the configs differ</h2>", _table(["key", *(run.name for run in runs)], rows)]
    parts += ["<h2>Curves</h2>", '<div class="charts">', *divs, "</div>", *_versions(runs)]
    head = f'<meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>{''.join(parts)}</body></html>\n"


SUMMARY = ("last step", "held-out success before", "held-out success after", "seconds", "seed")


def _summary(run: RecordedRun) -> list[str]:
    fields = ("held_out_success_before", "held_out_success_after", "seconds", "seed")
    state = "" if run.summary else " (not finished)"
    return [run.name, f"{run.rows[-1]['step']}{state}", *(_text(run.summary.get(f)) for f in fields)]


def _versions(runs: Sequence[RecordedRun]) -> list[str]:
    """One line per group of runs with the same package versions."""
    names: dict[str, list[str]] = {}
    for run in runs:
        versions = ", ".join(f"{name} {version}" for name, version in run.summary.get("versions", {}).items())
        names.setdefault(versions, []).append(run.name)
    return [f"<p>{escape(', '.join(who))}: {escape(what)}</p>" for what, who in names.items() if what]


def _curves(chart: Chart, runs: Sequence[RecordedRun]) -> go.Figure:
    figure = go.Figure()
    lines = chart.shown(runs)
    for index, run in enumerate(runs):
        for line in lines:
            steps, values = run.curve(line.field)
            labels = [*([run.name] if len(runs) > 1 else []), *([line.label] if len(lines) > 1 else [])]
            figure.add_scatter(
                x=steps,
                y=values,
                name=", ".join(labels) or line.label,
                legendgroup=run.name,
                mode="lines+markers" if line.sparse else "lines",
                opacity=0.45 if line.faint else 1,
                line=_stroke(line, colour(index)),
            )
    figure.update_yaxes(range=chart.span(runs), exponentformat="power")
    return _framed(figure, chart.title, "step")


def _stroke(line: Line, shade: str) -> dict[str, Any]:
    return {"color": shade, "width": 1.2 if line.faint else 2, "dash": "dash" if line.dashed else "solid"}


def _phases(runs: Sequence[RecordedRun]) -> go.Figure:
    """Stacked bars of the mean seconds per step of each phase."""
    figure = go.Figure()
    names = dict.fromkeys(
        key for run in runs for row in run.rows for key in row if key.startswith("seconds/")
    )
    for index, name in enumerate(names):
        means = [sum(run.curve(name)[1]) / len(run.rows) for run in runs]
        label = name.removeprefix("seconds/").replace("_", " ")
        shade = {"color": colour(index)}
        figure.add_bar(y=[run.name for run in runs], x=means, name=label, orientation="h", marker=shade)
    figure.update_layout(barmode="stack")
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _framed(figure, "Seconds of a step by phase (mean)", "seconds")


def _framed(figure: go.Figure, title: str, x: str) -> go.Figure:
    figure.update_layout(
        title={"text": title, "font": {"size": 15}},
        template="plotly_white",
        height=340,
        margin={"l": 50, "r": 10, "t": 45, "b": 40},
        legend={"orientation": "h", "y": -0.2, "traceorder": "normal"},
        xaxis_title=x,
    )
    return figure


def _div(figure: go.Figure, include_plotly: bool) -> str:
    config = {"displayModeBar": False, "responsive": True}
    html = plotly.io.to_html(figure, full_html=False, include_plotlyjs=include_plotly, config=config)
    return f"<div>{html}</div>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
