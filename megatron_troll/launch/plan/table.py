"""A plan as tables for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_troll.launch.plan.build import GIB, Plan
from megatron_troll.launch.plan.saved.layers import MODES

UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
TRAFFIC = {
    "tensor": "tensor parallel: all-gather, reduce-scatter",
    "expert": "experts: {dispatcher}",
    "expert_tensor": "shared experts' parts: all-gather, reduce-scatter",
    "context": "context parallel: keys and values, or heads",
    "pipeline": "pipeline: send and receive",
    "gradients": "gradients: reduce-scatter, or all-reduce",
    "weights": "weights: all-gather",
}


def tables(plan: Plan) -> Group:
    """All tables of a plan, the verdict last."""
    parts: list[RenderableType] = [
        _layout(plan),
        _parameters(plan),
        _memory(plan),
        _activations(plan),
        _logits(plan),
        _traffic(plan),
        _servers(plan),
        *map(Text, notes(plan)),
        Text(verdict(plan), style="bold green" if plan.fits else "bold red"),
    ]
    return Group(*parts)


def verdict(plan: Plan) -> str:
    """One sentence: whether the run fits and, if not, what takes the most memory."""
    worst = plan.worst
    device, reserve = plan.config.launch.device_gib, plan.config.launch.reserve_gib
    room = f"{_size(plan.limit)} (launch.device_gib {device:g} minus reserve_gib {reserve:g})"
    if plan.fits:
        return f"fits: stage {worst.stage} holds the most, {_size(worst.total)} of {room}"
    largest = sorted(worst.bytes.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {_size(value)}" for name, value in largest)
    return (
        f"does not fit: stage {worst.stage} holds {_size(worst.total)} of {room}; most of it: {named}. "
        "More ranks, ep or pp cut the states; recompute, cp, tp and train.token_budget the activations; "
        "optimizer.offload and optimizer.precision_aware the optimizer's state; rollout.max_sequences the "
        "caches and the prefill"
    )


def notes(plan: Plan) -> Iterator[str]:
    """The assumptions behind the figures."""
    work = plan.work
    yield (
        f"assumed: every answer is as long as it may be, which is {work.responses} responses of "
        f"{work.tokens} tokens on each data-parallel rank and {work.micro_batches} micro-batches of "
        f"{work.micro_tokens} tokens per optimizer step; tokens spread evenly over experts"
    )
    layers = "Transformer Engine's layers" if plan.te else "the local layers"
    yield f"activations are those of {layers}; working set and what Transformer Engine keeps are estimates"
    yield f"weight sync: {_size(plan.sync)} in bf16 to every server"
    rollouts, records, waiting = (_size(plan.host[name]) for name in ("rollouts", "records", "micro-batches"))
    yield (
        f"in host memory: {rollouts} of rollouts on every rank, {records} of their top-K and experts on rank "
        f"0, and {waiting} of micro-batches that wait"
    )


def _layout(plan: Plan) -> Table:
    sizes = plan.config.policy.layout.model_dump(exclude_none=True)
    table = _table(
        f"{plan.config.name}: {plan.world} ranks, {_words(sizes)}", "size", "of", "cut by", "parts"
    )
    for check in plan.checks:
        table.add_row(str(check.size), check.what, check.axis, str(check.parts))
    return table


def _parameters(plan: Plan) -> Table:
    table = _table("parameters", "model", "total", "padding", "multi-token prediction", "per rank")
    for model in plan.parameters:
        per_rank = " | ".join(f"{count:,}" for count in model.per_rank)
        table.add_row(model.model, f"{model.total:,}", f"{model.padding:,}", f"{model.mtp:,}", per_rank)
    return table


def _memory(plan: Plan) -> Table:
    table = _table("memory of a rank", "", *(f"stage {stage.stage}" for stage in plan.stages))
    for phase in ("states", "training", "generation"):
        rows: list[dict[str, int]] = [getattr(stage, phase) for stage in plan.stages]
        for name in rows[0]:
            when = "" if phase == "states" else f"{phase}: "
            _row(table, when + name, [_size(row[name]) for row in rows])
    _row(table, "at most", [_size(stage.total) for stage in plan.stages])
    if any(stage.host for stage in plan.stages):
        _row(table, "in host memory", [_size(stage.host) for stage in plan.stages])
    return table


def _activations(plan: Plan) -> Table:
    used = plan.config.policy.recompute
    table = _table("activations of a rank", "recompute", *(f"stage {stage.stage}" for stage in plan.stages))
    for mode in MODES:
        name = f"{mode} (this run)" if mode == used else mode
        _row(table, name, [_size(stage.activations[mode]) for stage in plan.stages])
    _row(table, "of it, dependent on routing", [_size(stage.experts) for stage in plan.stages])
    _row(table, "forwards kept at once", [str(stage.in_flight) for stage in plan.stages])
    return table


def _logits(plan: Plan) -> Table:
    table = _table("LM head, of a micro-batch", "mode", "logits and record")
    for name, value in plan.logits.by_mode().items():
        used = " (this run)" if name == plan.logits.mode else ""
        table.add_row(name + used, _size(value))
    return table


def _traffic(plan: Plan) -> Table:
    table = _table("sent by a rank in one rollout batch", "for", "")
    dispatcher = plan.config.policy.moe.dispatcher
    for name, value in asdict(plan.traffic).items():
        if value:
            table.add_row(TRAFFIC[name].format(dispatcher=dispatcher), _size(value))
    return table


def _servers(plan: Plan) -> Table:
    columns = ("GPUs", "weights", "a token in bf16", "in FP8", "state", "sequences in bf16", "in FP8")
    table = _table(f"a rollout server, each GPU; sequences of {plan.work.tokens} tokens that fit", *columns)
    for server in plan.servers:
        cells = (
            str(server.tp),
            _size(server.weights),
            _size(server.token_bf16),
            _size(server.token_fp8),
            _size(server.sequence),
            str(server.sequences_bf16),
            str(server.sequences_fp8),
        )
        table.add_row(*cells)
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _row(table: Table, name: str, cells: Sequence[str]) -> None:
    table.add_row(name, *cells)


def _words(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _size(value: float) -> str:
    """Format bytes in the largest unit of which there is at least 1, or in KiB."""
    unit, name = next((item for item in UNITS if value >= item[0]), UNITS[-1])
    return f"{value / unit:,.2f} {name}"
