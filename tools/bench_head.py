"""Time and memory of the LM head under TROLL and PPO-clip, compared with PPO-clip of other libraries.

python tools/bench_head.py --device cpu [--json FILE] [--shape cpu 30b_8k 30b_32k] [--repeats 7]

Each variant is one update of N tokens from final hidden states: forward to the loss, backward to the
gradients of hidden states and head. Variants take turns, so that other load slows all of them; figures are
medians. Peak extra memory excludes inputs and the gradient buffer of the head. Before timing, on a small
head, each variant's gradients are compared with those of its objective by autograd on whole rows in float64.
Variants that cannot run here are listed with the reason.

Also measured: the rate of a copy and of the head's matrix product, and the ratio of each variant's time to
that of its least work at those rates; selection and projection alone.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_record
import bench_tables
import torch
import torch.distributed as dist
from bench_baselines import MADE_AGAIN, baselines
from bench_case import Case, Shape, Variant, Work
from bench_methods import MaterialisedHead, clip, sparse_clip, troll
from bench_parts import Part, Rates, now, parts, rates
from torch import Tensor

from megatron_troll.config import Layout
from megatron_troll.mcore import parallel
from megatron_troll.mcore.head import Head, HeadContext
from megatron_troll.objectives.objective import Objective
from megatron_troll.parallel.groups import ALONE, Groups
from megatron_troll.parallel.segments import segments
from megatron_troll.types import HeadOutputs, ObjectiveInputs

TOLERANCE = 1e-3
SHAPES = {
    "cpu": Shape(2048, 256, 32_768, torch.float32),
    "30b_8k": Shape(8192, 2048, 151_936, torch.bfloat16),
    "30b_32k": Shape(32_768, 2048, 151_936, torch.bfloat16),
}
SMALL = Shape(96, 32, 496, torch.float32, k=16, answer=16)


@dataclass(frozen=True)
class Row:
    """Medians over the turns of a variant; least_ms: see bench_parts.Rates."""

    shape: str
    variant: str
    forward_ms: float
    backward_ms: float
    total_ms: float
    spread_ms: float
    peak_extra_mib: float
    least_ms: float
    clips: bool


@dataclass(frozen=True)
class Missing:
    """A variant that cannot run here."""

    shape: str
    variant: str
    reason: str


@dataclass(frozen=True)
class Measured:
    rows: list[Row]
    missing: list[Missing]
    rates: Rates
    parts: list[Part]


def variants(k: int) -> list[Variant]:
    """All variants. Logits at kept tokens access their rows of the weight once in forward and three times in
    backward: to read them for dH, and to read and write dW. Selection writes and reads whole rows."""
    own, old = troll(k=k, support="own"), troll(k=k, support="old")
    return [
        *baselines(),
        ours("ours/support_own", own, Work(1, 2, 4)),
        ours("ours/support_old", old, Work(0, 0, 4)),
        ours("ours/clip_sparse", sparse_clip(k), Work(0, 0, 4)),
        ours("ours/clip_dense", clip(), MADE_AGAIN, clips=True),
    ]


def ours(name: str, objective: Objective, work: Work, clips: bool = False) -> Variant:
    def prepare(case: Case, shape: Shape) -> Callable[[], Tensor]:
        main_grad = torch.zeros(case.weight.shape, device=case.weight.device)
        case.weight.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]
        return through(Head(model_of(case.weight)), objective, case, shape)

    return Variant(name, objective, work, prepare, clips=clips)


def through(head: Head, objective: Objective, case: Case, shape: Shape) -> Callable[[], Tensor]:
    """Return the forward from hidden states to the loss of `objective`, through `head`."""
    with torch.no_grad():
        old = head.read(case.old, case.target, replace(objective.reads_old, logp=True))
    old = objective.check_old(old)

    def forward() -> Tensor:
        new = head.read(case.hidden, case.target, objective.reads, HeadContext(old))
        return objective.loss(inputs_of(case, shape, new, old)).loss

    return forward


def model_of(weight: Tensor) -> Any:
    """A stand-in for a model, with the attributes that a head uses."""
    shape = SimpleNamespace(vocab=len(weight), softcap=None)
    stage = SimpleNamespace(output_weight=weight)
    return SimpleNamespace(stages=[stage], chunks=[stage], groups=Groups(), shape=shape)


def inputs_of(case: Case, shape: Shape, new: HeadOutputs, old: HeadOutputs) -> ObjectiveInputs:
    n, device = len(case.target), case.target.device
    token = torch.arange(n, device=device)
    owner, position = token // shape.answer, token % shape.answer
    each = torch.arange(n // shape.answer, device=device)
    assert old.logp is not None
    return ObjectiveInputs(
        new=new,
        old=old,
        rollout_logp=old.logp,
        rollout_topk=None,
        advantage=case.advantage,
        weight=torch.full((n,), 1.0 / n, device=device),
        position=position,
        segments=segments(owner, position, len(each), ALONE),
        group=each,
        rollout=each,
        rollouts=len(each),
        uniform=torch.zeros(n, device=device),
    )


def check(device: str) -> None:
    """Raise AssertionError if a variant's gradients in float32 differ from those in float64."""
    single = Case.of(SMALL, device)
    for variant in variants(SMALL.k):
        if variant.missing(device, SMALL.dtype) is not None:
            continue
        exact = single.to(torch.float64)
        through(MaterialisedHead(model_of(exact.weight)), variant.objective, exact, SMALL)().backward()
        variant.prepare(single, SMALL)().backward()
        for wide, found in zip(gradients(exact), gradients(single)):
            error = float((found.double() - wide).norm() / wide.norm())
            assert error < TOLERANCE, f"{variant.name}: gradients differ from float64 by {error:.2e}"
        single.clear()


def gradients(case: Case) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and head; the head's from autograd, or from the buffer that ours adds to."""
    weight = case.weight.grad
    if weight is None:
        weight = getattr(case.weight, "main_grad")  # noqa: B009
    assert case.hidden.grad is not None
    return case.hidden.grad, weight


def measure(name: str, device: str, repeats: int) -> Measured:
    shape = SHAPES[name]
    case, rated = Case.of(shape, device), rates(shape, device, repeats)
    every = {variant: variant.missing(device, shape.dtype) for variant in variants(shape.k)}
    ready = {v: v.prepare(case, shape) for v, reason in every.items() if reason is None}
    turns: dict[Variant, list[tuple[float, float]]] = {variant: [] for variant in ready}
    for turn in range(repeats + 1):
        for variant, forward in ready.items():
            taken = timed(case, forward, device)
            if turn:  # the first turn is a warm-up
                turns[variant].append(taken)
    rows = []
    for variant, forward in ready.items():
        peak, least = peak_mib(case, forward, device), rated.least_ms(variant.work, shape)
        rows.append(row_of(name, variant, turns[variant], peak, least))
    missing = [Missing(name, v.name, reason) for v, reason in every.items() if reason is not None]
    return Measured(rows, missing, rated, list(parts(name, shape, case, device, repeats)))


def row_of(
    shape: str, variant: Variant, turns: Sequence[tuple[float, float]], peak: float, least: float
) -> Row:
    totals = [sum(turn) for turn in turns]
    forward, backward, total = (statistics.median(column) for column in (*zip(*turns), totals))
    spread = max(totals) - min(totals)
    return Row(shape, variant.name, forward, backward, total, spread, peak, least, variant.clips)


def timed(case: Case, forward: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    case.clear()
    start = now(device)
    loss = forward()
    between = now(device)
    loss.backward()
    return 1e3 * (between - start), 1e3 * (now(device) - between)


def peak_mib(case: Case, forward: Callable[[], Tensor], device: str) -> float:
    case.clear()
    peak = bench_record.peak_mib(lambda: forward().backward(), device)
    own = case.weight.numel() * case.weight.element_size() if case.weight.grad is not None else 0
    return peak - own / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    names = arguments.shape or (["cpu"] if arguments.device == "cpu" else ["30b_8k", "30b_32k"])
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if arguments.device == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        parallel.start(Layout(), seed=0)  # Megatron's cross entropy needs its groups
        check(arguments.device)
        found = {name: measure(name, arguments.device, arguments.repeats) for name in names}
        parallel.stop()
    record = bench_record.record(
        arguments.device,
        [asdict(row) for measured in found.values() for row in measured.rows],
        missing=[asdict(absent) for measured in found.values() for absent in measured.missing],
        rates={name: asdict(measured.rates) for name, measured in found.items()},
        parts=[asdict(part) for measured in found.values() for part in measured.parts],
    )
    print(bench_tables.of_head(record))
    if arguments.json is not None:
        bench_record.write(arguments.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
