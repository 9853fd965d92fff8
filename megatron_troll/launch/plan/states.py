"""Bytes of weights, gradients and optimizer state on one rank."""

from dataclasses import dataclass

from megatron_troll.config import Model, Optimizer, PrecisionAware
from megatron_troll.launch.plan.buffers import Buffer, bucket_size, layout_of, layout_of_matrices
from megatron_troll.launch.plan.parameters import Holding, Parameter
from megatron_troll.launch.plan.ranks import Ranks

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1}
GRADIENT = MASTER = 4
MOMENTS = 8  # both moments, in fp32
MOMENTUM = 4  # Muon's, in fp32
REMAINDER = 2  # the half of an fp32 weight that its bf16 copy lacks
HOST = 16  # fp32 weight, gradient and moments


@dataclass(frozen=True)
class States:
    """Bytes on a rank. host: optimizer state in host memory; parameters: elements held, padding included."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    host: int


@dataclass(frozen=True)
class Buffers:
    """Gradient and parameter buffers of one model chunk, for AdamW and for Muon (matrices): dense parameters
    and, if they have data-parallel ranks of their own, experts. untrained: elements in no buffer; shared:
    elements of a tied embedding that another stage holds too; gathered: elements that an average rank gathers
    for the matrices it updates, by kind of Traffic."""

    dense: Buffer
    expert: Buffer
    dense_matrices: Buffer
    expert_matrices: Buffer
    untrained: int
    shared: int
    gathered: dict[str, float]

    @property
    def of_dense(self) -> tuple[Buffer, Buffer]:
        return self.dense, self.dense_matrices

    @property
    def of_experts(self) -> tuple[Buffer, Buffer]:
        return self.expert, self.expert_matrices

    @property
    def numel(self) -> int:
        return sum(buffer.numel for buffer in (*self.of_dense, *self.of_experts))


def trained_states(model: Model, ranks: Ranks, stages: list[list[Buffers]], rank: int) -> States:
    """States of a trained model on one rank; `stages`: the buffers of each stage's chunks."""
    chunks = stages[ranks.stage(rank)]
    width, optimizer = WIDTHS[model.dtype], model.optimizer
    held = sum(b.numel + b.untrained for b in chunks)

    def owned(of_dense: Buffer, of_experts: Buffer) -> int:
        if not optimizer.distributed:
            return of_dense.used + of_experts.used
        experts = of_experts.owned(ranks.expert_shard(rank), ranks.expert_dp)
        return of_dense.owned(ranks.dense_shard(rank), ranks.dp_cp) + experts

    on_device, on_host = per_number(model.dtype, optimizer)
    vectors = sum(owned(b.dense, b.expert) for b in chunks)
    matrices = sum(owned(b.dense_matrices, b.expert_matrices) for b in chunks)
    return States(
        parameters=held,
        weights=width * held,
        gradients=GRADIENT * sum(b.numel for b in chunks),
        optimizer=round(on_device * vectors) + per_matrix_number(model.dtype) * matrices,
        host=round(on_host * vectors),
    )


def frozen_states(model: Model, holding: Holding, stage: int) -> States:
    """States of a frozen model on one rank of a stage."""
    chunks = range(holding.ranks.chunks)
    held = sum(p.numel for chunk in chunks for p in holding.of_chunk(stage, chunk))
    return States(held, WIDTHS[model.dtype] * held, 0, 0, 0)


def per_number(dtype: str, optimizer: Optimizer) -> tuple[float, float]:
    """Bytes of optimizer state per element of a weight: on the device, in host memory."""
    if dtype == "fp32":
        return MOMENTS, 0.0
    if optimizer.precision_aware is not None:
        return REMAINDER + _moments(optimizer.precision_aware), 0.0
    return (MASTER + MOMENTS) * (1 - optimizer.offload), HOST * optimizer.offload


def per_matrix_number(dtype: str) -> int:
    """Bytes of Muon's state per element of a weight."""
    return MOMENTUM if dtype == "fp32" else MASTER + MOMENTUM


def _moments(kept: PrecisionAware) -> int:
    return WIDTHS[kept.exp_avg] + WIDTHS[kept.exp_avg_sq]


def buffers_of(model: Model, holding: Holding) -> list[list[Buffers]]:
    """The buffers of every stage's chunks."""
    ranks, optimizer = holding.ranks, model.optimizer
    muon = optimizer.name == "muon"

    def gathered(held: list[Parameter]) -> dict[str, float]:
        numbers: dict[str, float] = dict.fromkeys(("tensor", "expert_tensor"), 0.0)
        for p in (p for p in held if p.trained and p.matrix and p.cut):
            owners = (ranks.expert_dp if p.expert else ranks.dp_cp) if optimizer.distributed else 1
            numbers[p.cut] += p.numel / owners
        return numbers

    def chunk(stage: int, number: int) -> Buffers:
        held = holding.of_chunk(stage, number)
        # Megatron cuts only the first stage's buffers: nothing waits for the reduction of later ones.
        cut = optimizer.overlap_grad_reduce and stage == 0
        bucket = bucket_size(ranks.dp) if cut else None

        def buffer(experts: bool, matrices: bool) -> Buffer:
            those = [p for p in held if (p.expert, muon and p.matrix) == (experts, matrices)]
            over = ranks.expert_dp if experts else ranks.dp_cp
            if matrices and optimizer.distributed:
                return layout_of_matrices(those, over, bucket)
            return layout_of(those, over, optimizer.distributed, bucket)

        return Buffers(
            dense=buffer(False, False),
            expert=buffer(True, False),
            dense_matrices=buffer(False, True),
            expert_matrices=buffer(True, True),
            untrained=sum(p.numel for p in held if not p.trained),
            shared=sum(p.numel for p in held if p.shared),
            gathered=gathered(held) if muon else {},
        )

    return [[chunk(stage, i) for i in range(ranks.chunks)] for stage in range(ranks.layout.pp)]
