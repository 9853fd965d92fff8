"""The typed tree that configures a run.

Every field has its unit and range here; `load.py` reads YAML and overrides into it. Methods define the fields
of their slots next to their formulas (objectives/), rewards next to their code (rewards/).
"""

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from megatron_troll.config.data import Data, Origin, Reading
from megatron_troll.config.models import (
    Model,
    Models,
)
from megatron_troll.config.node import (
    Day,
    Files,
    FolderName,
    Fraction,
    Natural,
    Node,
    NonNegative,
    Positive,
    PositiveFloat,
    Seconds,
    Slot,
    Temperature,
)
from megatron_troll.config.resume import MadeWith, Resume
from megatron_troll.config.rewards import RewardConfig
from megatron_troll.config.serving import Launch, Serve, SGLang


class Sampling(Node):
    """The distribution that tokens are sampled from. temperature 0 is greedy, for evaluation only."""

    temperature: Temperature = Field(default=1.0, description="divides the logits")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        default=1.0, description="sample from the likeliest tokens that hold this mass; 1: all"
    )
    top_k: Natural = Field(default=0, description="0: all tokens")
    min_p: Fraction = Field(
        default=0.0, description="drop tokens below this share of the likeliest one's probability; 0: none"
    )
    stop: tuple[str, ...] = Field(
        default=(), description="stop tokens besides the tokenizer's end of sequence"
    )
    max_tokens: Positive = Field(default=1024, description="longest response, stop token included")

    @property
    def logprob_temperature(self) -> float:
        """The divisor of the logits in the log-probs of a sample: 1 for greedy ones."""
        return self.temperature or 1.0


class RolloutConfig(Node):
    """The size of a rollout batch, and the engine that samples it."""

    engine: str = Field(default="inprocess", description="engine by name or import path")
    prompts: Positive = Field(default=64, description="prompts per rollout batch")
    samples: Positive = Field(default=8, description="samples per prompt (the group)")
    staleness: Natural = Field(
        default=0, description="train on the batch sampled this many rollout batches earlier"
    )
    refill: Natural = Field(
        default=0,
        description="extra rounds per batch, in which new prompts take the place of those whose samples all "
        "got the same reward (DAPO's dynamic sampling); 0: none",
    )
    sampling: Sampling = Sampling()
    top_k: Natural = Field(
        default=64,
        description="top-K entries the engine returns per position, if something reads them; 0: none",
    )
    max_sequences: Positive = Field(
        default=512, description="sequences decoded at once on one data-parallel rank"
    )
    kv_cache: Literal["auto", "fp8_e4m3"] = Field(
        default="auto",
        description="of the engine: auto has the dtype of the weights; fp8_e4m3 in-process is simulated",
    )
    sglang: SGLang = SGLang()


class ObjectiveConfig(Node):
    """One method per slot (ALGORITHMS 7)."""

    advantage: Slot = Field(
        default=Slot(name="grpo"), description="from the rewards of a batch to advantages"
    )
    ratio: Slot = Field(
        default=Slot(name="token"), description="how a token is weighed against the old policy"
    )
    trust_region: Slot = Field(
        default=Slot(name="troll"), description="how far an update may move the policy"
    )
    kl: Slot = Field(default=Slot(name="none"), description="penalty that keeps the policy near a reference")
    correction: Slot = Field(
        default=Slot(name="none"), description="weight for a rollout policy that is not the old one"
    )
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = Field(
        default="token-mean", description="weights of tokens, normalised over the whole optimizer step"
    )
    entropy_bonus: NonNegative = Field(default=0.0, description="weight of the entropy in the objective")
    entropy_over: Literal["full", "sparse"] = Field(
        default="full", description="whose entropy: the whole vocabulary's, or that of troll's sparse policy"
    )
    sum_norm_length: Positive | None = Field(
        default=None, description="L_max of seq-mean-token-sum-norm; default: rollout.sampling.max_tokens"
    )
    head: Literal["auto", "sparse"] = Field(
        default="auto",
        description="the LM head's gradient: K columns wide where every method allows it, whole rows in "
        "chunks otherwise; sparse: refuse what needs whole rows",
    )
    old: Literal["trainer", "engine"] = Field(
        default="trainer",
        description="whose log-probs are the old policy: a forward of the trainer, or the engine's own",
    )


class Train(Node):
    """The length of training, and the split of a rollout batch into optimizer steps."""

    steps: Positive = Field(default=30, description="rollout batches")
    updates: Positive = Field(default=4, description="optimizer steps per rollout batch")
    epochs: Positive = Field(
        default=1, description="times each response is trained on; updates is over all epochs"
    )
    token_budget: Positive = Field(
        default=8192, description="tokens of one micro-batch on one data-parallel rank"
    )
    head_chunk: Positive | None = Field(
        default=None,
        description="tokens whose logits the LM head holds at once; default: 2048 on a GPU, 128 on a CPU",
    )
    packing: bool = Field(
        default=True, description="sequences end to end in one row; false: a padded row each"
    )
    share_prefixes: bool | None = Field(
        default=None,
        description="read a prompt once for all responses of its group in a micro-batch, and an episode once "
        "for those that fork from it; default: on a CPU, with packing",
    )
    replay: Literal["none", "old", "rollout"] = Field(
        default="none",
        description="experts that the policy's training forwards repeat: those of the old policy's forward "
        "(R2), or those that the engine chose (R3); none: routers choose again",
    )
    shuffle_rewards: bool = Field(
        default=False, description="control experiment: rewards permuted over the batch"
    )
    max_skipped: Positive = Field(
        default=3, description="consecutive steps with NaN or Inf before the run stops"
    )


class WarmStart(Node):
    """Supervised steps on demonstrations (`mtroll sft`): chat files whose assistant turns carry loss."""

    files: Files = Field(description="demonstrations, JSONL or Parquet")
    malformed: Literal["error", "skip"] = Field(
        default="error", description="a line that is not a demonstration: stop, or skip and count it"
    )
    steps: Positive = Field(default=200, description="optimizer steps")
    sequences: Positive = Field(default=128, description="demonstrations per optimizer step")


class EvaluationConfig(Node):
    """Held-out success, sampled at training temperature unless set otherwise."""

    every: Natural = Field(
        default=10, description="rollout batches between evaluations; 0: only before and after"
    )
    prompts: Positive | None = Field(default=None, description="default: all held-out prompts")
    samples: Positive = Field(default=1, description="answers per held-out prompt")
    temperature: Temperature | None = Field(default=None, description="default: that of training")


class EvalSet(Origin, Reading):
    """A data set of `mtroll eval`, named by its key."""

    prompts: Positive | None = Field(
        default=None, description="number of prompts, from the first; default: all"
    )
    samples: Positive = Field(default=1, description="answers per prompt")
    sampling: Sampling = Sampling()
    pass_at: tuple[Positive, ...] = Field(
        default=(1,), description="each k of pass@k and, above 1, of maj@k; at most `samples`"
    )
    success_above: float = Field(
        default=0.5, description="pass@k and maj@k count a reward beyond this as a success"
    )
    reward: RewardConfig | None = Field(default=None, description="default: `reward` of the run")
    template_arguments: dict[str, str | int | float | bool] | None = Field(
        default=None, description="arguments of the chat template; default: data.template_arguments"
    )

    @model_validator(mode="after")
    def _names_both_columns(self) -> Self:
        self.check_columns()
        return self

    @field_validator("pass_at")
    @classmethod
    def _enough_samples(cls, pass_at: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        samples = info.data.get("samples")
        if samples is not None and max(pass_at, default=0) > samples:
            raise ValueError(f"{max(pass_at)} is more than the samples of a prompt: samples is {samples}")
        return pass_at


class Checkpoint(Node):
    """torch_dist checkpoints under runs/<name>/checkpoints."""

    every: Natural = Field(default=0, description="rollout batches between checkpoints; 0: only at the end")
    keep_last: Positive = Field(default=2, description="newest checkpoints that stay on disk")
    keep_best: bool = Field(default=True, description="also keep the one with the best held-out success")
    asynchronous: bool = Field(default=False, description="write behind the training steps that follow")
    export: bool = Field(default=True, description="write the final policy in Hugging Face format")


class Observe(Node):
    """Outputs besides metrics.jsonl, and hang detection."""

    tensorboard: bool = Field(default=True, description="event files under runs/<name>/tensorboard")
    wandb_project: str | None = Field(default=None, description="W&B project; default: no W&B")
    energy: bool = Field(
        default=False,
        description="report gradient size by frequency of the sampled token; costs a pass over the logits",
    )
    rollouts: bool = Field(default=True, description="keep every rollout's text, reward and log-probs")
    hang_timeout_s: Seconds = Field(
        default=600.0,
        description="seconds without progress on any rank before every rank shows its stack",
    )
    peak_tflops: PositiveFloat | None = Field(
        default=None, description="per device, for MFU; default: known devices"
    )


class Config(Node):
    """A run."""

    name: FolderName = Field(description="the run folder is runs/<name>")
    runs: Annotated[str, Field(min_length=1)] = Field(default="runs", description="folder of the run folders")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        default=0, description="of prompt order, sampling and random weights"
    )
    date: Day | None = Field(
        default=None,
        description="the day that stands in prompts for today's, where a chat template writes it (Llama 3.2, "
        "SmolLM3); default: the day of the first start, which is kept when the run is resumed",
    )
    resume: bool | Resume = Field(default=False, description="continue from the run's newest checkpoint")
    models: Models
    data: Data | None = Field(default=None, description="not needed by `mtroll eval`")
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig(name="exact")
    objective: ObjectiveConfig = ObjectiveConfig()
    train: Train = Train()
    sft: WarmStart | None = None
    evaluation: EvaluationConfig = EvaluationConfig()
    eval: dict[str, EvalSet] = Field(default={})
    checkpoint: Checkpoint = Checkpoint()
    observe: Observe = Observe()
    launch: Launch = Launch()
    serve: Serve = Serve()

    @property
    def accepted(self) -> tuple[MadeWith, ...]:
        """Parts that may differ from those the continued checkpoint was made with."""
        return self.resume.accept if isinstance(self.resume, Resume) else ()

    @property
    def policy(self) -> Model:
        return self.models.policy

    @property
    def own_servers(self) -> bool:
        return self.rollout.engine == "sglang" and self.rollout.sglang.own
