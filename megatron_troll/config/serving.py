"""Options of a run's SGLang servers: how they are queried (rollout.sglang) and started (serve)."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_troll.config.node import Natural, Node, NonNegative, Positive, PositiveFloat, Seconds, Threads


class WeightSync(Node):
    """Transfer of new weights to SGLang's servers, each time they have been trained."""

    via: Literal["disk", "tensor", "distributed"] = Field(
        default="disk",
        description="disk: safetensors that servers read; tensor: shared memory of one machine; distributed: "
        "a process group of trainer and servers (NCCL, gloo on CPU)",
    )
    folder: str | None = Field(
        default=None,
        description="for `disk`: the same path on trainer and servers; default: runs/<name>/weights. Each "
        "sync writes a folder there and deletes those that this run wrote before, and nothing else",
    )
    address: str | None = Field(
        default=None,
        description="for `distributed`: rank 0's address; default: that on its route to the servers",
    )
    bucket_mib: Positive = Field(default=512, description="MiB sent at once; needs twice that memory")
    timeout_s: Seconds = Field(default=600.0, description="for each reply of a server during a sync")


class ProbeConfig(Node):
    """Comparison of the servers' log-probs with the trainer's after each sync, on prompts of the run."""

    prompts: Natural = Field(default=8, description="prompts compared; 0: no probe")
    tokens: Positive = Field(default=64, description="number of tokens compared, at the end of each prompt")
    max_kl: PositiveFloat = Field(
        default=0.05, description="nats, mean over the tokens; above it the run ends: KL(engine || trainer)"
    )


class SGLang(Node):
    """The servers that `rollout.engine: sglang` uses."""

    servers: tuple[str, ...] = Field(
        default=(), description="URLs; default: those that `mtroll serve` started for this run"
    )
    router: str | None = Field(default=None, description="URL of a sglang-router to use instead")
    api_key_file: str | None = Field(
        default=None, description="file of the servers' API key, readable by its owner only"
    )
    concurrency: Positive = Field(default=64, description="requests under way at one server")
    deadline_s: Seconds = Field(
        default=300.0,
        description="for one request; after it, another server continues the partial answer",
    )
    attempts: Positive = Field(default=8, description="failures of one request in a row that end the run")
    patience_s: Seconds = Field(
        default=300.0, description="time without a usable server after which the run ends"
    )
    buffer: bool = Field(
        default=True,
        description="keep answers in runs/<name>/buffer until a checkpoint has what was learnt from them: a "
        "run that is continued after a crash does not ask for them again",
    )
    colocated: bool = Field(
        default=False,
        description="servers on the trainer's own GPUs: they release the memory of weights and caches while "
        "it trains, and `mtroll serve` starts them so that they can (SGLang's --enable-memory-saver)",
    )
    sync: WeightSync = WeightSync()
    probe: ProbeConfig = ProbeConfig()

    @property
    def own(self) -> bool:
        """Whether the run uses the servers that `mtroll serve` starts for it."""
        return not (self.servers or self.router)


class Mamba(Node):
    """The state cache of a model with linear attention (Qwen3-Next, Qwen3.5)."""

    ssm_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="of the states"
    )
    cache_strategy: Literal["auto", "no_buffer", "extra_buffer", "extra_buffer_lazy"] = Field(
        default="auto", description="how prefixes share states (SGLang's --mamba-radix-cache-strategy)"
    )
    memory_ratio: PositiveFloat = Field(default=0.9, description="memory of states over that of the KV cache")


class Serve(Node):
    """The server processes of `mtroll serve`. They serve models.rollout if it is set, otherwise
    models.policy, in that model's dtype."""

    servers: Positive = Field(default=1, description="server processes on this machine")
    host: str = Field(
        default="127.0.0.1", description="address they listen on; any but loopback needs an API key"
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        default=30000, description="of the first; the others count up from it"
    )
    python: str = Field(
        default=".venv-sglang/bin/python",
        description="interpreter that has SGLang installed: a path, or a command of PATH",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="auto: cuda if there is a GPU; cpu needs `make sglang-env`"
    )
    threads: Threads | None = Field(
        default=None, description="CPU threads of one server; default: cores / servers"
    )
    tp: Positive = Field(default=1, description="GPUs of one server")
    ep: Positive = Field(default=1, description="expert-parallel size, among those")
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None, description="of GPU memory for weights and caches; default: SGLang's"
    )
    kv_scales: str | None = Field(
        default=None,
        description="file of tools/calibrate_fp8_kv.py, for rollout.kv_cache fp8_e4m3",
    )
    force_unscaled_kv: bool = Field(
        default=False, description="serve an FP8 cache without calibrated scales: all scales are 1"
    )
    deterministic: bool = Field(
        default=False, description="answers that do not depend on what else is under way; slower, GPU only"
    )
    routed_experts: bool = Field(default=False, description="return which experts each token was routed to")
    mamba: Mamba | None = Field(default=None, description="linear attention only; default: SGLang's")
    flags: dict[str, str | int | float | bool] = Field(
        default={}, description="more flags of SGLang's server, without dashes in front; true: a bare flag"
    )
    start_timeout_s: Seconds = Field(default=900.0, description="time until every server must be healthy")
    restarts: Natural = Field(default=3, description="times that a server that died is started again")


class Launch(Node):
    """The ranks that `mtroll` starts itself when no launcher (srun, torchrun) has started it; GPU memory."""

    ranks: Annotated[int, Field(ge=1, le=65_536)] | None = Field(
        default=None, description="default: the smallest world that holds the layouts"
    )
    threads: Threads | None = Field(default=None, description="CPU threads per rank; default: cores / ranks")
    device_gib: PositiveFloat = Field(
        default=139.0, description="memory of a GPU, for `mtroll plan`; default: an H200"
    )
    reserve_gib: NonNegative = Field(
        default=10.0, description="part of it left to CUDA, NCCL and fragmentation, for `mtroll plan`"
    )
