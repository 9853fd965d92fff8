"""Options of a model: experts, distillation, layout; its optimizer's algorithm, schedule and state."""

from typing import Literal

from pydantic import Field

from megatron_troll.config.node import (
    DecayRate,
    Fraction,
    Natural,
    Node,
    NonNegative,
    Positive,
    PositiveFloat,
)

RecomputeModule = Literal["core_attn", "moe_act", "moe", "mlp"]


class MoE(Node):
    """Routing, load balancing and dispatch of the experts of a mixture-of-experts model."""

    dispatcher: Literal["alltoall", "allgather", "deepep"] = Field(
        default="alltoall",
        description="how tokens reach their experts: exchanged, or gathered by every rank (few experts for "
        "their top-k); deepep needs that package",
    )
    aux_loss: NonNegative = Field(
        default=0.0, description="coefficient of the load-balancing loss, global over a step"
    )
    bias_rate: NonNegative = Field(
        default=0.0,
        description="balancing without a loss: after each optimizer step every expert's bias, added to its "
        "softmax score for the choice, moves by this towards the mean load; 0: no bias",
    )
    freeze_router: bool = Field(default=False, description="routers keep their weights")


class Distill(Node):
    """Distillation of the policy into a rollout model: besides PPO's its loss has weight x KL(policy ||
    rollout model), over the policy's top k and the sampled token, with all other tokens counted as one."""

    k: Positive = Field(default=20, description="tokens of the policy's record, besides the sampled one")
    weight: NonNegative = Field(default=1.0, description="initial weight of the KL; 0: no KL")
    target_kl: PositiveFloat | None = Field(
        default=0.1,
        description="KL, in nats per token, that the weight is adjusted to hold; null: constant weight",
    )
    gain: PositiveFloat = Field(
        default=0.2,
        description="after a batch log(weight) moves by gain x log(KL / target_kl), at most by gain",
    )
    limits: tuple[PositiveFloat, PositiveFloat] = Field(
        default=(0.01, 100.0), description="lower and upper bound of the adjusted weight"
    )


class LearningRateSchedule(Node):
    """Learning rate over optimizer steps."""

    decay: Literal["constant", "cosine", "linear"] = Field(
        default="constant", description="after the warm-up"
    )
    warmup_steps: Natural = Field(default=0, description="optimizer steps of a linear rise from 0")
    decay_steps: Positive | None = Field(default=None, description="default: all optimizer steps of the run")
    min_lr_ratio: Fraction = Field(default=0.0, description="share of lr at which decay ends")


class Muon(Node):
    """Muon's update of matrices: lr x scale x sqrt(the longer side) x the orthogonalised momentum
    (https://kellerjordan.github.io/posts/muon/; the scale is that of arXiv:2502.16982)."""

    momentum: DecayRate = Field(default=0.95, description="decay rate of the mean of gradients")
    nesterov: bool = Field(default=True, description="orthogonalise what the next momentum would be")
    steps: Positive = Field(default=5, description="Newton-Schulz iterations")
    scale: PositiveFloat = Field(
        default=0.2, description="with 0.2 an update is as large as AdamW's, and its learning rates fit"
    )


class PrecisionAware(Node):
    """Dtypes of the moments in Transformer Engine's Adam; of each fp32 weight it keeps the 16 bits that the
    bf16 weight lacks."""

    exp_avg: Literal["fp32", "bf16", "fp16", "fp8"] = Field(
        default="bf16", description="first moment; fp8: with a scale per tensor"
    )
    exp_avg_sq: Literal["fp32", "bf16", "fp16", "fp8"] = Field(default="bf16", description="second moment")


class Layout(Node):
    """Parallel sizes. The data-parallel size follows from the number of ranks."""

    tp: Positive = Field(default=1, description="tensor parallel; above 1 it brings sequence parallelism")
    pp: Positive = Field(default=1, description="pipeline stages")
    vpp: Positive | None = Field(
        default=None, description="virtual pipeline stages per rank (interleaved schedule)"
    )
    cp: Positive = Field(default=1, description="context parallel: slices of every sequence")
    ep: Positive = Field(default=1, description="expert parallel: ranks that the experts are spread over")
    etp: Positive = Field(default=1, description="expert tensor parallel: ranks that one expert is cut over")
