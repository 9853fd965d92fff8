"""The tables of docs/sharing.md, from the records of bench_peer.py, bench_generation.py, bench_sharing.py and
bench_topk.py."""

from collections.abc import Iterator

from bench_record import Record


def of_peer(record: Record) -> Iterator[str]:
    """One row a side; ratios to every side that is no TROLL or PPO-clip of this build."""
    rows = record["rows"]
    others = [row for row in rows if not row["side"].startswith("ours")]
    yield head(
        "",
        "generation s",
        "update s",
        "step s",
        "memory MiB",
        *(f"{part} / {row['side']}" for row in others for part in ("update", "step", "memory")),
    )
    for row in rows:
        cells = [f"{row[f'{part}_s']:.1f}" for part in ("generation", "update", "step")]
        cells.append(f"{row['peak_mib']:,.0f}")
        for other in others:
            cells += [f"{row[f'{part}_s'] / other[f'{part}_s']:.2f}" for part in ("update", "step")]
            cells.append(f"{row['peak_mib'] / other['peak_mib']:.2f}")
        yield line(row["side"], *cells)


def of_generation(record: Record) -> Iterator[str]:
    yield head("128 requests", "before, tokens/s", "now, tokens/s", "times")
    for row in record["rows"]:
        yield line(row["work"], f"{row['before']:.1f}", f"{row['now']:.1f}", f"{row['ratio']:.2f}")


def of_sharing(record: Record) -> Iterator[str]:
    """Update time by prompt length and group size, and its growth with the FLOPs that are counted."""
    rows = record["rows"]
    sizes = sorted({row["samples"] for row in rows if row["shared"]})
    yield head("prompt tokens", "share of prompt", "read by each, s", *(f"{size} samples" for size in sizes))
    for prompt in sorted({row["prompt_tokens"] for row in rows}):
        here = [row for row in rows if row["prompt_tokens"] == prompt]
        shared = {row["samples"]: row for row in here if row["shared"]}
        apart = next(row for row in here if not row["shared"])
        share = f"{prompt / (prompt + record['answer_tokens']):.0%}"
        ratios = (f"{shared[size]['of_apart']:.2f}" for size in sizes)
        yield line(str(prompt), share, f"{apart['seconds']:.1f}", *ratios)
    costs = {size: [r["s_per_tflop"] for r in rows if r["shared"] and r["samples"] == size] for size in sizes}
    yield ""
    yield head("seconds a counted TFLOP", *(f"{size} samples" for size in sizes))
    for number, prompt in enumerate(sorted({row["prompt_tokens"] for row in rows})):
        yield line(f"prompts of {prompt}", *(f"{costs[size][number]:.2f}" for size in sizes))


def of_topk(record: Record) -> Iterator[str]:
    yield head("threads", "top-K s", "exp and sum s", "speed of top-K")
    for row in record["rows"]:
        yield line(str(row["threads"]), f"{row['topk_s']:.3f}", f"{row['exp_s']:.3f}", f"{row['speed']:.0%}")


KINDS = {
    "bench_peer": of_peer,
    "bench_generation": of_generation,
    "bench_sharing": of_sharing,
    "bench_topk": of_topk,
}


def head(*names: str) -> str:
    return line(*names) + "\n" + "|---" * len(names) + "|"


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
