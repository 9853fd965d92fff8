"""The one typed tree that a run is configured by.

Every field has its unit and range here; `load.py` reads YAML and overrides into it, and methods keep the
fields of their own slot beside their maths (objectives/), rewards beside theirs (rewards/).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Files = Annotated[tuple[str, ...], Field(min_length=1)]


class Node(BaseModel):
    """Strict and frozen: unknown keys and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Slot(BaseModel):
    """A method by name (or by import path `package.module:Class`) with the fields of its own config."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    name: str

    @property
    def fields(self) -> dict[str, object]:
        return dict(self.model_extra or {})


class Layout(Node):
    """Parallel sizes. The data-parallel size is what remains of the world."""

    tp: Positive = 1
    pp: Positive = 1
    vpp: Positive | None = Field(
        default=None, description="virtual pipeline stages per rank (interleaved schedule)"
    )
    cp: Positive = 1
    ep: Positive = 1
    etp: Positive = 1


class Schedule(Node):
    """Learning rate over optimizer steps."""

    decay: Literal["constant", "cosine", "linear"] = "constant"
    warmup_steps: Natural = 0
    decay_steps: Positive | None = Field(default=None, description="default: all optimizer steps of the run")
    min_lr_ratio: Fraction = 0.0


class Optimizer(Node):
    """AdamW on Megatron's (distributed) optimizer."""

    lr: PositiveFloat = 1e-6
    betas: tuple[Fraction, Fraction] = (0.9, 0.99)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegative = 0.0
    grad_norm: NonNegative = Field(
        default=1.0, description="clip the global gradient norm to this; 0 never clips"
    )
    distributed: bool = True
    schedule: Schedule = Schedule()


class Model(Node):
    """One model: where it comes from, how it is laid out, how it is trained."""

    path: str = Field(
        description="Hugging Face folder: config.json, tokenizer and, if pretrained, safetensors"
    )
    init: Literal["pretrained", "random"] = "pretrained"
    dtype: Literal["fp32", "bf16"] = "bf16"
    spec: Literal["auto", "local", "te"] = "auto"
    layout: Layout = Layout()
    optimizer: Optimizer = Optimizer()
    aux_loss: NonNegative = Field(
        default=0.0, description="coefficient of the load-balancing loss, global over a step"
    )
    recompute: Literal["none", "selective", "full"] = "none"


class Data(Node):
    """Prompt files, JSONL or Parquet."""

    files: Files
    held_out: Positive | Files = Field(default=1024, description="a count split from `files`, or files")
    schema_: Literal["auto", "dapo", "gsm8k", "messages"] = Field(default="auto", alias="schema")
    malformed: Literal["error", "skip"] = "error"
    max_prompt_tokens: Positive = 1024
    overlong_prompts: Literal["error", "skip"] = "error"
    shuffle: bool = True


class Sampling(Node):
    """The law a token is drawn from. temperature 0 is greedy, for evaluation only."""

    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Natural = Field(default=0, description="0: all tokens")
    min_p: Fraction = 0.0
    stop: tuple[str, ...] = Field(
        default=(), description="stop tokens beside the tokenizer's end of sequence"
    )
    max_tokens: Positive = 1024


class RolloutConfig(Node):
    """What is sampled for one rollout batch, and by which engine."""

    engine: str = Field(default="inprocess", description="engine by name or import path")
    prompts: Positive = Field(default=64, description="prompts per rollout batch")
    samples: Positive = Field(default=8, description="samples per prompt (the group)")
    sampling: Sampling = Sampling()
    top_k: Natural = Field(default=64, description="top-K entries the engine returns per position; 0: none")
    max_sequences: Positive = Field(
        default=512, description="sequences decoded at once on one data-parallel rank"
    )
    kv_cache: Literal["auto", "fp8_e4m3"] = Field(
        default="auto", description="fp8_e4m3 simulates a quantised cache"
    )


class Overlong(Node):
    """Answers cut at max_tokens: kept as they are, taken out of the loss, or given `reward`."""

    mode: Literal["keep", "mask", "penalise"] = "keep"
    reward: float = 0.0


class RewardConfig(Slot):
    """A verifier by name or import path, its own fields beside it."""

    timeout_s: PositiveFloat = 10.0
    overlong: Overlong = Overlong()


class ObjectiveConfig(Node):
    """One method per slot (ALGORITHMS 7)."""

    advantage: Slot = Slot(name="grpo")
    ratio: Slot = Slot(name="token")
    trust_region: Slot = Slot(name="troll")
    kl: Slot = Slot(name="none")
    correction: Slot = Slot(name="none")
    aggregation: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"] = "token-mean"
    sum_norm_length: Positive | None = Field(
        default=None, description="L_max of seq-mean-token-sum-norm; default: rollout.sampling.max_tokens"
    )
    old: Literal["trainer", "engine"] = "trainer"


class Train(Node):
    """How long, and how a rollout batch becomes optimizer steps."""

    steps: Positive = Field(default=30, description="rollout batches")
    updates: Positive = Field(default=4, description="optimizer steps per rollout batch")
    epochs: Positive = Field(
        default=1, description="times each response is trained on; updates is over all epochs"
    )
    token_budget: Positive = Field(
        default=8192, description="tokens of one micro-batch on one data-parallel rank"
    )
    packing: bool = True
    shuffle_rewards: bool = Field(
        default=False, description="control experiment: rewards permuted over the batch"
    )
    max_skipped: Positive = Field(
        default=3, description="consecutive steps with NaN or Inf before the run stops"
    )


class WarmStart(Node):
    """Supervised steps on demonstrations (`mtroll sft`): chat files whose assistant turns carry loss."""

    files: Files
    steps: Positive = 200
    sequences: Positive = Field(default=128, description="demonstrations per optimizer step")


class Evaluation(Node):
    """Held-out success, sampled at training temperature unless set otherwise."""

    every: Natural = Field(
        default=10, description="rollout batches between evaluations; 0: only before and after"
    )
    prompts: Positive | None = Field(default=None, description="default: all held-out prompts")
    samples: Positive = 1
    temperature: NonNegative | None = Field(default=None, description="default: that of training")


class Checkpoint(Node):
    """torch_dist checkpoints under runs/<name>/checkpoints."""

    every: Natural = Field(default=0, description="rollout batches between checkpoints; 0: only at the end")
    keep_last: Positive = 2
    keep_best: bool = True
    asynchronous: bool = False
    export: bool = Field(default=True, description="write the final policy in Hugging Face format")


class Observe(Node):
    """Where the figures go beside metrics.jsonl."""

    tensorboard: bool = True
    wandb_project: str | None = None
    rollouts: bool = Field(default=True, description="keep every rollout's text, reward and log-probs")
    hang_timeout_s: PositiveFloat = 600.0
    peak_tflops: PositiveFloat | None = Field(
        default=None, description="per device, for MFU; default: known devices"
    )


class Launch(Node):
    """How many ranks `mtroll` starts by itself when nothing (srun, torchrun) has started it."""

    ranks: Positive | None = Field(
        default=None, description="default: the smallest world the layouts allow, or all GPUs"
    )
    threads: Positive | None = Field(default=None, description="CPU threads per rank; default: cores / ranks")


class Config(Node):
    """A run. `models` is a map, so that a reference, a critic and a rollout model can join the policy."""

    name: str
    runs: str = "runs"
    seed: Natural = 0
    resume: bool = False
    models: dict[str, Model]
    data: Data
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig(name="exact")
    objective: ObjectiveConfig = ObjectiveConfig()
    train: Train = Train()
    sft: WarmStart | None = None
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    observe: Observe = Observe()
    launch: Launch = Launch()

    @field_validator("models")
    @classmethod
    def _policy_is_named(cls, models: dict[str, Model]) -> dict[str, Model]:
        if "policy" not in models:
            raise ValueError(f"the model to train must be named 'policy'; got {sorted(models)}")
        return models

    @property
    def policy(self) -> Model:
        return self.models["policy"]
