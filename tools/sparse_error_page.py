"""The tables of docs/sparse-error.md, from the record of tools/sparse_error.py."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench_record import Record

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RECORD = DOCS / "sparse-error.md", DOCS / "sparse_error.json"
BLOCK = re.compile(r"(<!-- made by tools/sparse_error.py -->\n).*?(<!-- end -->)", re.DOTALL)
KEPT = ("answers", "K, delta", "kept, mean", "kept, p99", "ended by K", "mass, mean", "mass, p1", "outside")
KL = (
    "answers",
    "updates",
    "K, delta",
    "exact KL",
    "sparse KL",
    "error",
    "relative",
    "`own`: KL",
    "error",
    "rel.",
)


def page(text: str, found: Record) -> str:
    """`text` with the tables of `found` between its marks."""
    return BLOCK.sub(lambda block: block[1] + "\n".join(tables(found)) + "\n" + block[2], text)


def tables(found: Record) -> Iterator[str]:
    machine, rows = found["machine"], found["rows"]
    versions = ", ".join(
        f"{name} {version}" for name, version in found["versions"].items() if name == "torch"
    )
    yield f"{found['date']}, {machine['device']}, {machine['threads']} thread, {versions}. " + "; ".join(
        f"`{row['task']}`: {row['answers']} answers, {row['tokens']} tokens" for row in firsts(rows)
    )
    yield from ("", head(KEPT))
    for row in rows:
        if row["updates"] == rows[0]["updates"]:
            yield line(
                row["task"],
                setting(row),
                f"{row['kept_mean']:.1f}",
                f"{row['kept_p99']:.0f}",
                f"{row['ended_by_k']:.0%}",
                f"{row['covered_mean']:.5f}",
                f"{row['covered_p1']:.5f}",
                f"{row['outside_old']:.1e}",
            )
    yield from ("", head(KL))
    for row in rows:
        numbers = (row["kl_exact"], row["kl_old"], row["error_old"], row["kl_own"], row["error_own"])
        exact, old, error, own, own_error = (f"{number:.2e}" for number in numbers)
        relative, own_relative = f"{row['relative_old']:.1%}", f"{row['relative_own']:.1%}"
        first = (row["task"], str(row["updates"]), setting(row))
        yield line(*first, exact, old, error, relative, own, own_error, own_relative)


def firsts(rows: Sequence[Record]) -> list[Record]:
    """The first row of each task."""
    return list({row["task"]: row for row in reversed(rows)}.values())[::-1]


def setting(row: Record) -> str:
    return f"{row['k']}, {row['delta']:.0e}".replace("e-0", "e-")


def head(names: Sequence[str]) -> str:
    return line(*names) + "\n" + "|---" * len(names) + "|"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
