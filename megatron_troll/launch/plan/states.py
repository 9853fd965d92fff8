"""Bytes of weights, gradients and optimizer state on one rank."""

from dataclasses import dataclass

from megatron_troll.config.tree import Model, Optimizer, PrecisionAware
from megatron_troll.launch.plan.buffers import Buffer, bucket_size, layout_of
from megatron_troll.launch.plan.parameters import Holding
from megatron_troll.launch.plan.ranks import Ranks

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
GRADIENT = MASTER = 4
MOMENTS = 8  # both, in fp32
REMAINDER = 2  # of an fp32 weight, beside its bf16 half
HOST = 16  # fp32 weight, gradient and moments


@dataclass(frozen=True)
class States:
    """Bytes. host: of optimizer state in the machine's memory; parameters: numbers held, padding included."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int


@dataclass(frozen=True)
class Buffers:
    """Those of one chunk: dense parameters and, where experts are spread over ranks, theirs. Numbers in none
    of them, and of `dense` those of a tied embedding that another stage has too."""

    dense: Buffer
    expert: Buffer
    untrained: int
    shared: int


def trained_states(model: Model, ranks: Ranks, stages: list[list[Buffers]], rank: int) -> States:
    """What one rank of a trained model holds; `stages`: the buffers of each stage's chunks."""
    chunks = stages[ranks.stage(rank)]
    width, optimizer = WIDTHS[model.dtype], model.optimizer
    held = sum(b.dense.numel + b.expert.numel + b.untrained for b in chunks)
    owned = sum(b.dense.used + b.expert.used for b in chunks)
    if optimizer.distributed:
        owned = sum(
            b.dense.owned(ranks.dense_shard(rank), ranks.dp_cp)
            + b.expert.owned(ranks.expert_shard(rank), ranks.expert_dp)
            for b in chunks
        )
    on_device, on_host = per_number(model.dtype, optimizer)
    return States(
        parameters=held,
        weights=width * held,
        gradients=GRADIENT * sum(b.dense.numel + b.expert.numel for b in chunks),
        optimizer=round(on_device * owned),
        host=round(on_host * owned),
    )


def frozen_states(model: Model, holding: Holding, stage: int) -> States:
    """What one rank of a stage holds of a model that is only read."""
    chunks = range(holding.ranks.chunks)
    held = sum(p.numel for chunk in chunks for p in holding.of_chunk(stage, chunk))
    return States(held, WIDTHS[model.dtype] * held, 0, 0, 0)


def per_number(dtype: str, optimizer: Optimizer) -> tuple[float, float]:
    """Bytes of optimizer state for each number of a weight: on the device, in host memory."""
    if dtype == "fp32":
        return MOMENTS, 0.0
    if optimizer.precision_aware is not None:
        return REMAINDER + _moments(optimizer.precision_aware), 0.0
    return (MASTER + MOMENTS) * (1 - optimizer.offload), HOST * optimizer.offload


def _moments(kept: PrecisionAware) -> int:
    return WIDTHS[kept.exp_avg] + WIDTHS[kept.exp_avg_sq]


def buffers_of(model: Model, holding: Holding) -> list[list[Buffers]]:
    """The buffers of every stage's chunks."""
    ranks, optimizer = holding.ranks, model.optimizer

    def chunk(stage: int, number: int) -> Buffers:
        held = holding.of_chunk(stage, number)
        # Megatron cuts the buffers of the first stage alone: the reduction of later ones is not waited for.
        cut = optimizer.overlap_grad_reduce and stage == 0
        bucket = bucket_size(ranks.dp) if cut else None
        dense, expert = ([p for p in held if p.expert == kind] for kind in (False, True))
        return Buffers(
            dense=layout_of(dense, ranks.dp_cp, optimizer.distributed, bucket),
            expert=layout_of(expert, ranks.expert_dp, optimizer.distributed, bucket),
            untrained=sum(p.numel for p in held if not p.trained),
            shared=sum(p.numel for p in held if p.shared),
        )

    return [[chunk(stage, i) for i in range(ranks.chunks)] for stage in range(ranks.layout.pp)]
