"""The results of an evaluation: eval.json, and a table on the terminal."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from megatron_troll.config import Config
from megatron_troll.evals.estimators import CONFIDENCE, RESAMPLES
from megatron_troll.evals.results import EvalResult
from megatron_troll.observe.trackers import versions
from megatron_troll.system import write_atomic
from megatron_troll.terminal import shown


def write(path: Path, config: Config, results: Sequence[EvalResult]) -> None:
    """Write eval.json: every result by the name of its data set, with the config, seed and versions used."""
    content = {
        "sets": {result.name: {k: v for k, v in asdict(result).items() if k != "name"} for result in results},
        "interval": {"confidence": CONFIDENCE, "resamples": RESAMPLES, "over": "prompts"},
        "seed": config.seed,
        "config": config.model_dump(by_alias=True),
        "versions": versions(),
    }
    write_atomic(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def table(results: Sequence[EvalResult]) -> Table:
    """Table with one row per figure; the caption says why a requested figure is missing."""
    missing = [f"{one.name}: no maj@k, {one.no_majority}" for one in results if one.no_majority]
    interval = f"{CONFIDENCE:.0%} interval"
    listed = Table(
        *("data set", "prompts", "figure", "value", interval),
        box=None,
        caption=Text(shown("\n".join(missing))) if missing else None,
        caption_justify="left",
    )
    for column in (1, 3, 4):
        listed.columns[column].justify = "right"
    for result in results:
        size = f"{result.prompts:,} x {result.samples}"
        for i, (name, value, around) in enumerate(_rows(result)):
            first = (Text(shown(result.name)), size) if i == 0 else ("", "")
            listed.add_row(*first, name, value, around)
    return listed


def _rows(result: EvalResult) -> Iterator[tuple[str, str, str]]:
    for name, figure in result.figures.items():
        form = "{:.1f}" if name == "response_length" else "{:.3f}"
        low, high = form.format(figure.low), form.format(figure.high)
        yield name, form.format(figure.value), f"{low} to {high}"
    counts = {
        "reward timeouts": result.timeouts,
        "reward crashes": result.crashes,
        "reward errors": result.errors,
        "unclosed reasoning": result.unclosed,
    }
    for name, count in counts.items():
        if count:
            yield name, str(count), ""
