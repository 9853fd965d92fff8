"""Time and memory of the LM head under TROLL and PPO-clip, against plain PyTorch.

python tools/bench_head.py --device cpu [--json FILE] [--shape cpu 30b_8k 30b_32k] [--repeats 7]

Each variant is one update of N tokens from final hidden states: forward to the loss, backward to the
gradients of hidden states and head. Variants take turns, so that a busy machine slows all; figures are
medians. Peak extra memory leaves out inputs and the gradient buffer of the head. Gradients are compared with
float64 first, on a small head.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from troll_kernels.sparsify import sparse_logp

from megatron_troll.config.tree import ObjectiveConfig, Slot
from megatron_troll.mcore.head import Beside, Head
from megatron_troll.objectives.compose import compose
from megatron_troll.objectives.objective import Objective
from megatron_troll.objectives.slots import Policy, Statistics
from megatron_troll.objectives.sparse import Sparse
from megatron_troll.objectives.trust_region.clip import Clip
from megatron_troll.parallel.groups import ALONE, Groups
from megatron_troll.parallel.segments import segments
from megatron_troll.types import ObjectiveInputs, Readings, Reads, Support

TOLERANCE = 1e-3


@dataclass(frozen=True)
class Shape:
    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    k: int = 64


SHAPES = {
    "cpu": Shape(2048, 256, 32_768, torch.float32),
    "30b_8k": Shape(8192, 2048, 151_936, torch.bfloat16),
    "30b_32k": Shape(32_768, 2048, 151_936, torch.bfloat16),
}
SMALL = Shape(96, 32, 500, torch.float64, k=16)


@dataclass(frozen=True)
class Case:
    """hidden [N, h] and weight [V, h] with gradients; old [N, h] what the old policy had; target [N] drawn
    from it; advantage [N]."""

    hidden: Tensor
    old: Tensor
    weight: Tensor
    target: Tensor
    advantage: Tensor

    @staticmethod
    def of(shape: Shape, device: str) -> "Case":
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float) -> Tensor:
            return scale * torch.randn(*size, generator=generator, device=device)

        # Logits with a standard deviation near 3: entropies like those of a language model.
        weight = normal(shape.vocab, shape.hidden, scale=3.0 / shape.hidden**0.5)
        old = normal(shape.tokens, shape.hidden, scale=1.0)
        hidden = old + normal(shape.tokens, shape.hidden, scale=0.05)
        return Case(
            hidden.to(shape.dtype).requires_grad_(),
            old.to(shape.dtype),
            weight.to(shape.dtype).requires_grad_(),
            _drawn(old, weight),
            normal(shape.tokens, scale=1.0),
        )


def _drawn(hidden: Tensor, weight: Tensor) -> Tensor:
    """[N] one token of each row's law, from rows in chunks."""
    return torch.cat([(part @ weight.t()).softmax(1).multinomial(1)[:, 0] for part in hidden.split(256)])


@dataclass(frozen=True)
class Variant:
    """One way to the loss. `prepare` runs once, before the clock."""

    name: str
    prepare: Callable[[Case, Shape], Callable[[], Tensor]]


def ours(name: str, objective: Objective) -> Variant:
    def prepare(case: Case, shape: Shape) -> Callable[[], Tensor]:
        main_grad = torch.zeros(case.weight.shape, device=case.weight.device)
        if shape.dtype == torch.float64:
            main_grad = main_grad.double()
        case.weight.main_grad = main_grad  # pyright: ignore[reportAttributeAccessIssue]
        head = _head(case.weight)
        with torch.no_grad():
            old = head.read(case.old, case.target, replace(objective.reads_old, logp=True))
        old = objective.check_old(old)

        def forward() -> Tensor:
            new = head.read(case.hidden, case.target, objective.reads, Beside(old))
            return objective.loss(_inputs(case, new, old)).loss

        return forward

    return Variant(name, prepare)


def dense_pytorch(case: Case, shape: Shape) -> Callable[[], Tensor]:
    """PPO-clip by autograd on whole rows of logits, as a trainer without a fused head has it."""

    with torch.no_grad():
        parts = zip(case.old.split(256), case.target.split(256))
        old = torch.cat([_log_prob(hidden, case.weight, target) for hidden, target in parts])

    def forward() -> Tensor:
        ratio = (_log_prob(case.hidden, case.weight, case.target) - old).exp()
        limited = ratio.clamp(0.8, 1.2)
        return -torch.minimum(ratio * case.advantage, limited * case.advantage).mean()

    return forward


def _log_prob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight)
    rows = logits if logits.dtype == torch.float64 else logits.float()
    return rows.log_softmax(1).gather(1, target[:, None])[:, 0]


def variants(k: int) -> list[Variant]:
    def troll(**fields: Any) -> Objective:
        return compose(ObjectiveConfig(trust_region=Slot(name="troll", k=k, **fields)))  # pyright: ignore

    clip = compose(ObjectiveConfig(trust_region=Slot(name="clip")))
    return [
        Variant("dense/pytorch", dense_pytorch),
        ours("ours/support_own", troll(support="own")),
        ours("ours/support_old", troll(support="old")),
        ours("ours/clip_sparse", replace(clip, trust_region=SparseClip(k=k))),
        ours("ours/clip_dense", clip),
    ]


class SparseClip(Sparse, Clip):
    """PPO-clip on TROLL's sparse policies, without projection: what the K-column gradient gives by itself."""

    @property
    def reads_old(self) -> Reads:
        return Reads(topk=Support("own", self.k, self.delta))

    def prepare_old(self, old: Readings) -> Readings:
        return old

    def policy(self, inputs: ObjectiveInputs, statistics: Statistics | None) -> Policy:
        old, new = inputs.old.topk, inputs.new.topk
        assert old is not None
        assert new is not None
        logp, before = (
            sparse_logp(topk.logits, topk.count, topk.vocab, self.p_d).gather(1, old.place[:, None])[:, 0]
            for topk in (new, old)
        )
        return Policy(logp, before, torch.zeros_like(logp))


def _head(weight: Tensor) -> Head:
    model: Any = SimpleNamespace(
        stages=[SimpleNamespace(output_weight=weight)],
        groups=Groups(),
        shape=SimpleNamespace(vocab=len(weight)),
    )
    return Head(model)


def _inputs(case: Case, new: Readings, old: Readings) -> ObjectiveInputs:
    n, device = len(case.target), case.target.device
    owner = torch.arange(n, device=device) // 256
    responses = int(owner.max()) + 1
    each = torch.arange(responses, device=device)
    assert old.logp is not None
    return ObjectiveInputs(
        new=new,
        old=old,
        rollout_logp=old.logp,
        rollout_topk=None,
        advantage=case.advantage,
        weight=torch.full((n,), 1.0 / n, device=device),
        position=torch.arange(n, device=device) % 256,
        segments=segments(owner, torch.arange(n, device=device) % 256, responses, ALONE),
        group=each,
        rollout=each,
        rollouts=responses,
        uniform=torch.zeros(n, device=device),
    )


@dataclass(frozen=True)
class Row:
    shape: str
    variant: str
    forward_ms: float
    backward_ms: float
    total_ms: float
    spread_ms: float
    peak_extra_mib: float


def measure(name: str, shape: Shape, device: str, repeats: int) -> list[Row]:
    case = Case.of(shape, device)
    ready = [(variant.name, variant.prepare(case, shape)) for variant in variants(shape.k)]
    times: dict[str, list[tuple[float, float]]] = {label: [] for label, _ in ready}
    for turn in range(repeats + 1):
        for label, forward in ready:
            taken = _timed(case, forward, device)
            if turn:
                times[label].append(taken)
    rows = []
    for label, forward in ready:
        parts = times[label]
        totals = [sum(part) for part in parts]
        rows.append(
            Row(
                name,
                label,
                statistics.median(part[0] for part in parts),
                statistics.median(part[1] for part in parts),
                statistics.median(totals),
                max(totals) - min(totals),
                _peak_mib(case, forward, device),
            )
        )
    return rows


def _timed(case: Case, forward: Callable[[], Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of forward and backward."""
    _clear(case)
    start = _now(device)
    loss = forward()
    between = _now(device)
    loss.backward()
    return 1e3 * (between - start), 1e3 * (_now(device) - between)


def _clear(case: Case) -> None:
    case.hidden.grad = None
    case.weight.grad = None


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_mib(case: Case, forward: Callable[[], Tensor], device: str) -> float:
    _clear(case)
    own_buffer = case.weight.numel() * case.weight.element_size()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward().backward()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            forward().backward()
        peak = _highest(recorded)
    made = own_buffer if case.weight.grad is not None else 0
    return (peak - made) / 2**20


def _highest(recorded: profile) -> int:
    """The most bytes that were allocated and not freed, of the allocations that the profiler saw."""
    results: Any = recorded.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest


def check(device: str) -> None:
    """Gradients of every variant in float32 against itself in float64. Raises AssertionError."""
    exact = Case.of(SMALL, device)
    single = Case(
        exact.hidden.detach().float().requires_grad_(),
        exact.old.float(),
        exact.weight.detach().float().requires_grad_(),
        exact.target,
        exact.advantage,
    )
    narrow = replace(SMALL, dtype=torch.float32)
    for variant in variants(SMALL.k):
        grads = [_gradients(case, variant, shape) for case, shape in ((exact, SMALL), (single, narrow))]
        for wide, found in zip(*grads):
            error = float((found.double() - wide).norm() / wide.norm())
            assert error < TOLERANCE, f"{variant.name}: gradients differ from float64 by {error:.2e}"


def _gradients(case: Case, variant: Variant, shape: Shape) -> tuple[Tensor, Tensor]:
    _clear(case)
    forward = variant.prepare(case, shape)
    forward().backward()
    assert case.hidden.grad is not None
    weight = case.weight.grad
    if weight is None:
        weight = getattr(case.weight, "main_grad")  # noqa: B009
    return case.hidden.grad.clone(), weight.clone()


def show(rows: Sequence[Row]) -> None:
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        base = here[0]
        print(f"\n{shape}: ratios to {base.variant}")
        print(f"{'variant':20} {'forward':>10} {'backward':>10} {'total':>10} {'+-':>8} {'MiB':>8}   ratios")
        for row in here:
            ratios = (
                row.total_ms / base.total_ms,
                row.backward_ms / base.backward_ms,
                row.peak_extra_mib / base.peak_extra_mib,
            )
            print(
                f"{row.variant:20} {row.forward_ms:10.1f} {row.backward_ms:10.1f} {row.total_ms:10.1f} "
                f"{row.spread_ms:8.1f} {row.peak_extra_mib:8.1f}   " + "  ".join(f"{r:.2f}" for r in ratios)
            )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=None)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    check(arguments.device)
    names = arguments.shape or (["cpu"] if arguments.device == "cpu" else ["30b_8k", "30b_32k"])
    rows = [row for name in names for row in measure(name, SHAPES[name], arguments.device, arguments.repeats)]
    show(rows)
    if arguments.json is not None:
        machine = (
            torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor() or "cpu"
        )
        record = {
            "machine": {"device": machine, "threads": torch.get_num_threads()},
            "versions": {name: version(name) for name in ("torch", "megatron-core")},
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
