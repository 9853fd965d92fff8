"""Report on the KL estimators: JSON, Markdown and a picture."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from megatron_troll.observe.charts import COLOURS
from megatron_troll.study.kl import (
    Quality,
    Residual,
    TokenPool,
    estimate,
    estimators,
    expectation,
    qualities,
    residuals,
    seconds,
)
from megatron_troll.system import write_atomic

SIZES = (8, 32, 128, 512)
KS = (8, 16, 32, 64, 128, 256)
# Rows over a large vocabulary, to measure the cost of an estimator.
COST_VOCAB, COST_TOKENS, REPEATS = 151_936, 32, 3
SMALLEST_SHOWN = 1e-5


@dataclass(frozen=True)
class Analysis:
    """Figures of one pool. tokens, responses, vocab: its sizes; exact: its mean KL, nats per token; sizes:
    responses in a mean; seconds: per 1,000 tokens on random rows of COST_VOCAB logits."""

    tokens: int
    responses: int
    vocab: int
    exact: float
    sizes: tuple[int, ...]
    qualities: dict[str, Quality]
    residuals: tuple[Residual, ...]
    seconds: dict[str, float]


def analyse(pool: TokenPool, ks: Sequence[int]) -> Analysis:
    """Analyse a pool, with TIKE at each of `ks` that is below its vocabulary size."""
    small = [k for k in ks if k < pool.vocab]
    terms = {name: estimate(method, pool) for name, method in estimators(small).items()}
    values = {name: term.value for name, term in terms.items()}
    expected = {name: expectation(method, pool) for name, method in estimators(small).items()}
    cut = [row for k in small for row in residuals(k, terms[f"tike {k}"], values["exact"])]
    rows = random_rows()
    return Analysis(
        tokens=len(pool.target),
        responses=len(pool.response.unique()),
        vocab=pool.vocab,
        exact=float(values["exact"].mean()),
        sizes=SIZES,
        qualities=qualities(values, expected, pool.response, SIZES),
        residuals=tuple(cut),
        seconds={name: seconds(method, rows, REPEATS) for name, method in estimators(KS).items()},
    )


def random_rows() -> TokenPool:
    """Random rows of two models that differ a little, over a large vocabulary."""
    generator = torch.Generator().manual_seed(0)
    rows = 3 * torch.randn(COST_TOKENS, COST_VOCAB, generator=generator)
    other = rows + 0.1 * torch.randn(rows.shape, generator=generator)
    order = torch.arange(COST_TOKENS)
    return TokenPool(rows, other, rows.argmax(1), order)


def write(analysis: Analysis, output: Path, command: str, date: str) -> None:
    """Write `output` (Markdown), the same figures as .json beside it, and images/<name>.png."""
    picture = f"images/{output.stem}.png"
    write_atomic(output.with_suffix(".json"), json.dumps(asdict(analysis), indent=1) + "\n")
    plot(analysis, output.parent / picture)
    write_atomic(output, markdown(analysis, picture, command, date))


def markdown(analysis: Analysis, picture: str, command: str, date: str) -> str:
    a = analysis
    found = ["estimator", "bias, expected", "of exact", "bias, sampled", "standard error"]
    cut = ["k", "mass", "share of positions", "mean residual", "mean size", "exact KL there"]
    return "\n".join(
        [
            "# Estimators of KL(policy || reference)",
            "",
            f"Made on {date} by this command; do not edit.",
            "",
            "```sh",
            command,
            "```",
            "",
            f"A pool of {a.responses:,} responses, {a.tokens:,} tokens over {a.vocab} token ids, sampled",
            f"from the policy itself. The exact KL (full rows of both models) is {a.exact:.4f} nats per",
            "token. An estimate is the mean over the tokens of n responses; responses are resampled 2,000",
            "times. Bias is against the exact KL of the same positions: in expectation over the token of",
            "each (from the full rows), and with the sampled tokens, with its standard error. If the two",
            "are far apart, rare tokens carry the estimate and the pool holds too few of them.",
            "",
            *table([*found, *(f"deviation, n = {size}" for size in a.sizes)], _quality_rows(a)),
            "",
            "k3 is limited to [0, 10] by default, as in verl; the row without limits shows what that does.",
            "These are values. As penalties they differ more: the gradient of k1 is 0 on average, that of",
            "k2 is the true one of this KL, that of k3 is the one of KL(reference || policy)",
            "([algorithms.md](algorithms.md), 3).",
            "",
            f"![bias, spread and cost]({picture})",
            "",
            "## What truncation leaves out",
            "",
            "Exact minus truncated sum, by the mass that the k largest probabilities hold at a position.",
            "",
            *table(cut, _residual_rows(a)),
            "",
            "## Cost",
            "",
            f"On random rows of {COST_VOCAB:,} logits, on this CPU: seconds per 1,000 tokens to read both",
            "rows and to differentiate the estimate. The logsumexp of both rows, which all need, is part of",
            "it. Kept of the reference for each token: one number (k1, k2, k3), k + 1 numbers (TIKE), the",
            "whole row or the hidden state (exact).",
            "",
            *table(["estimator", "seconds"], ([name, f"{value:.2f}"] for name, value in a.seconds.items())),
            "",
        ]
    )


def table(head: Sequence[str], rows: Iterator[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows)]


def _quality_rows(analysis: Analysis) -> Iterator[list[str]]:
    for name, quality in analysis.qualities.items():
        expected = f"{quality.expected:+.5f}", f"{quality.expected / analysis.exact:+.1%}"
        sampled = f"{quality.bias:+.5f}", f"{quality.standard_error:.5f}"
        yield [name, *expected, *sampled, *(f"{spread:.4f}" for spread in quality.spread)]


def _residual_rows(analysis: Analysis) -> Iterator[list[str]]:
    for row in analysis.residuals:
        end = "]" if row.high == 1 else ")"
        figures = (f"{value:.2e}" for value in (row.mean, row.size, row.exact))
        yield [str(row.k), f"[{row.low:g}, {row.high:g}{end}", f"{row.share:.1%}", *figures]


def plot(analysis: Analysis, path: Path) -> None:
    """Plot spread against responses (TIKE only with the largest k), size of the bias, and cost."""
    figure = Figure(figsize=(10, 3.4), dpi=130, layout=ConstrainedLayoutEngine())
    FigureCanvasAgg(figure)
    spread, bias, cost = figure.subplots(1, 3)
    truncated = [name for name in analysis.qualities if name.startswith("tike")]
    shown = [name for name in analysis.qualities if name not in truncated[:-1]]
    for i, name in enumerate(shown):
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "label": name, "markersize": 4}
        spread.plot(analysis.sizes, analysis.qualities[name].spread, marker="osv^Dx"[i % 6], **style)
    spread.set(xscale="log", yscale="log", xlabel="responses")
    spread.legend(fontsize=7, frameon=False)
    biases = {name: abs(quality.expected) for name, quality in analysis.qualities.items()}
    _bars(bias, {name: value for name, value in biases.items() if name != "exact"})
    bias.set(xscale="log", xlim=(SMALLEST_SHOWN, None))
    _bars(cost, analysis.seconds)
    titles = (
        "standard deviation (nats)",
        "expected bias (nats)",
        f"seconds / 1,000 tokens, V = {COST_VOCAB:,}",
    )
    for axes, title in zip((spread, bias, cost), titles):
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, facecolor="white")


def _bars(axes: Axes, values: Mapping[str, float]) -> None:
    axes.barh(list(values), list(values.values()), color=COLOURS[0])
    axes.invert_yaxis()
