"""Rewrite the tables of docs/head.md and docs/sharing.md from the JSON that the benches wrote:

python tools/bench_tables.py

Each table is between `<!-- table of FILE -->` and `<!-- end of table -->`.
"""

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sharing_tables

DOCS = Path(__file__).parents[1] / "docs"
PAGES = (DOCS / "head.md", DOCS / "sharing.md")
BLOCK = re.compile(r"(<!-- table of (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Record = dict[str, Any]


def page(text: str) -> str:
    """`text` with every table rebuilt from its file."""
    return BLOCK.sub(lambda block: block[1] + table(block[2]) + block[3], text)


def table(file: str) -> str:
    record = json.loads((DOCS / file).read_text())
    for kind, lines in sharing_tables.KINDS.items():
        if file.startswith(kind):
            return "\n".join([where(record), "", *lines(record)]) + "\n"
    return of_head(record) if file.startswith("bench_head") else of_step(record)


def of_head(record: Record) -> str:
    lines = [where(record)]
    for shape in dict.fromkeys(row["shape"] for row in record["rows"]):
        lines += _of_head(record, shape)
    return "\n".join(lines) + "\n"


def _of_head(record: Record, shape: str) -> Iterator[str]:
    rows = [row for row in record["rows"] if row["shape"] == shape]
    base, best = rows[0], min((row for row in rows if row["clips"]), key=lambda row: row["total_ms"])
    yield ""
    yield f"Shape `{shape}`; the fastest PPO-clip is `{best['variant']}`:"
    yield ""
    yield (
        "| variant | forward ms | backward ms | total ms | spread ms | extra MiB | "
        f"total / `{base['variant']}` | backward | memory | total / fastest PPO-clip | total / least |"
    )
    yield "|---" * 11 + "|"
    for row in rows:
        times = (
            row[name] for name in ("forward_ms", "backward_ms", "total_ms", "spread_ms", "peak_extra_mib")
        )
        ratios = (
            row["total_ms"] / base["total_ms"],
            row["backward_ms"] / base["backward_ms"],
            row["peak_extra_mib"] / base["peak_extra_mib"],
            row["total_ms"] / best["total_ms"],
            row["total_ms"] / row["least_ms"],
        )
        cells = [f"{time:.1f}" for time in times] + [f"{ratio:.2f}" for ratio in ratios]
        yield f"| `{row['variant']}` | {' | '.join(cells)} |"
    for absent in record["missing"]:
        if absent["shape"] == shape:
            yield f"| `{absent['variant']}` | not run: {absent['reason']} |{' |' * 9}"
    yield ""
    yield _of_parts(record, shape)


def _of_parts(record: Record, shape: str) -> str:
    rates, told = record["rates"][shape], []
    for part in record["parts"]:
        if part["shape"] == shape:
            share = "" if part["gb_s"] is None else f" ({part['gb_s'] / rates['copy_gb_s']:.0%} of the copy)"
            told.append(f"{part['part']} {part['ms']:.1f} ms{share}")
    return (
        f"A copy moves {rates['copy_gb_s']:.1f} GB/s, the head's matrix product runs at "
        f"{rates['matrix_tflops']:.3g} TFLOP/s. By themselves: {', '.join(told)}."
    )


def of_step(record: Record) -> str:
    rows = {row["variant"]: row for row in record["rows"]}
    clips = ("clip/materialised", "clip/fused", "clip/fused_unchunked")
    best = min((rows[name] for name in clips), key=lambda row: row["step_ms"])
    lines = [
        where(record),
        "",
        f"The fastest PPO-clip is `{best['variant']}`. The head is "
        + ", ".join(f"{head_share(rows[name], rows['no_head']):.0%} of `{name}`" for name in clips[:2])
        + ".",
        "",
        "| step | ms | spread ms | old policy ms | forward, backward ms | optimizer ms | projected | "
        "extra MiB | / `clip/materialised` | / fastest PPO-clip |",
        "|---" * 10 + "|",
    ]
    for name, row in rows.items():
        names = ("step_ms", "spread_ms", "old_policy_ms", "forward_backward_ms", "optimizer_ms")
        projected = "-" if row["projected"] is None else f"{row['projected']:.0%}"
        cells = [f"{row[name]:.0f}" for name in names] + [projected, f"{row['peak_extra_mib']:.0f}"]
        cells += [f"{ratio(row, other):.2f}" for other in (rows[clips[0]], best)]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ratio(row: Record, other: Record) -> float:
    """The median over turns of the times of `row` divided by those of `other`; both ran in every turn."""
    return statistics.median(mine / theirs for mine, theirs in zip(row["turns_ms"], other["turns_ms"]))


def head_share(row: Record, without: Record) -> float:
    return 1.0 - ratio(without, row)


def where(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    return (
        f"{record['date']}, {machine['device']}, {machine['threads']} threads, load "
        f"{machine['load_before']:.1f} before the first run; {told}."
    )


if __name__ == "__main__":
    for written in PAGES:
        written.write_text(page(written.read_text()))
    sys.exit(0)
