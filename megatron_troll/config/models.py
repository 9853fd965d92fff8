"""The models of a run: where each comes from, its layout, experts, distillation and optimizer."""

from typing import Annotated, Literal

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


class Model(Node):
    """One model: its source, its layout over ranks, and its training."""

    path: str = Field(
        description="Hugging Face folder: config.json, tokenizer and, if pretrained, safetensors"
    )
    init: Literal["pretrained", "random"] = Field(
        default="pretrained", description="weights of the folder, or new random ones by its config.json"
    )
    dtype: Literal["fp32", "bf16"] = Field(default="bf16", description="of the weights in the forward pass")
    spec: Literal["auto", "local", "te"] = Field(
        default="auto",
        description="layers: te is Transformer Engine, auto selects it if CUDA and the package exist",
    )
    layout: Layout = Layout()
    optimizer: Optimizer = Optimizer()
    moe: MoE = MoE()
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations to compute again in the backward pass instead of keeping them: of "
        "`recompute_modules`, or of whole layers",
    )
    recompute_modules: tuple[RecomputeModule, ...] = Field(
        default=("core_attn",),
        description="for recompute selective: core attention, the activation function of experts (moe_act, "
        "Transformer Engine only), experts with their routing (moe), a dense feed-forward (mlp)",
    )


class ReferenceConfig(Node):
    """A frozen model that the policy is kept near. Everything but its weights is the policy's: shape, dtype,
    layout."""

    path: str = Field(description="Hugging Face folder with safetensors")


class CriticOptimizer(Optimizer):
    """The critic's optimizer, with its own default rates."""

    lr: LearningRate = Field(default=1e-5, description="learning rate after the warm-up")
    weight_decay: Decay = Field(default=0.01, description="decoupled weight decay")


class CriticConfig(Model):
    """The model for PPO's advantages: the body of a language model with a value head that starts at zero."""

    optimizer: CriticOptimizer = CriticOptimizer()  # pyright: ignore[reportIncompatibleVariableOverride]


class RolloutModelConfig(Model):
    """The model that generates the rollouts in the policy's place, usually a smaller one (Jackpot, arXiv
    2602.06107). It learns from the same batches: by PPO with the clip's defaults on its own samples, and by
    distillation of the policy."""

    distill: Distill = Distill()


class Models(Node):
    """The models of a run, each with its own weights; only the policy is required."""

    policy: Model
    reference: ReferenceConfig | None = Field(default=None, description="for objective.kl")
    critic: CriticConfig | None = Field(default=None, description="for objective.advantage gae")
    rollout: RolloutModelConfig | None = Field(
        default=None, description="generates the rollouts; null: the policy"
    )

    @property
    def drawing(self) -> Model:
        """The model that generates the rollouts."""
        return self.policy if self.rollout is None else self.rollout
