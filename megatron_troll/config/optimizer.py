"""Options of an optimizer."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_troll.config.model_options import LearningRateSchedule, Muon, PrecisionAware
from megatron_troll.config.node import DecayRate, Fraction, Node

LearningRate = Annotated[float, Field(gt=0, le=1e30)]
Decay = Annotated[float, Field(ge=0, le=100)]


class Optimizer(Node):
    """AdamW on Megatron's (distributed) optimizer, or Muon for matrices and AdamW for everything else."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: q, k, v, gate, up and each expert are matrices of their own; embeddings, head, "
        "norms and whatever else is a vector stay with AdamW",
    )
    muon: Muon = Muon()
    lr: LearningRate = Field(default=1e-6, description="learning rate after the warm-up")
    betas: tuple[DecayRate, DecayRate] = Field(default=(0.9, 0.99), description="Adam's decay rates")
    eps: Annotated[float, Field(ge=1e-30, le=1)] = Field(default=1e-8, description="Adam's epsilon")
    weight_decay: Decay = Field(default=0.0, description="decoupled weight decay")
    grad_norm: Annotated[float, Field(ge=0, le=1e9)] = Field(
        default=1.0, description="clip the global gradient norm to this; 0 never clips"
    )
    distributed: bool = Field(default=True, description="shard its state over data-parallel ranks (ZeRO 1)")
    overlap_grad_reduce: bool = Field(
        default=False,
        description="sum gradients over data-parallel ranks while the backward pass goes on, in buckets of "
        "40 million numbers; false: at its end",
    )
    precision_aware: PrecisionAware | None = Field(
        default=None,
        description="state in less memory (needs Transformer Engine); default: all of it in fp32",
    )
    offload: Fraction = Field(
        default=0.0, description="share of the state that is kept, and updated, in host memory (needs CUDA)"
    )
    schedule: LearningRateSchedule = LearningRateSchedule()


class CriticOptimizer(Optimizer):
    """The critic's optimizer, with its own default rates."""

    lr: LearningRate = Field(default=1e-5, description="learning rate after the warm-up")
    weight_decay: Decay = Field(default=0.01, description="decoupled weight decay")
