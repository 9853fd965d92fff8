"""Read the sizes of a Qwen3, Qwen3-MoE or Qwen3-Next model from its Hugging Face config.json."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_troll.config import ConfigError

LayerType = Literal["full_attention", "linear_attention"]

# config.json keys that are supported only with these values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "use_sliding_window": (False, None),
    "attention_bias": (False, None),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None),
    "hidden_act": ("silu",),
}
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)
EXPERT_SIZES = ("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size")


@dataclass(frozen=True)
class LinearAttention:
    """Sizes of the Gated DeltaNet layers (arXiv:2412.06464): each key head serves value_heads / key_heads
    neighbouring value heads; `conv` is the width of the causal convolution."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_dim


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model. experts is 0 for a dense model, shared_expert_ffn is 0 without a shared expert;
    `vocab` is the published size, unpadded; with a soft-cap, logits are softcap * tanh(x / softcap).

    layer_types       type of each layer, in order
    linear            sizes of the layers with linear attention; None without such layers
    output_gate       whether full attention is gated by its input (arXiv:2505.06708)
    rotary_fraction   fraction of head_dim that is rotated
    zero_centred_norms   whether norms scale by 1 + weight
    """

    family: str
    vocab: int
    hidden: int
    layer_types: tuple[LayerType, ...]
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    experts: int
    experts_per_token: int
    expert_ffn: int
    norm_topk: bool
    tied: bool
    rope_theta: float
    norm_eps: float
    init_std: float
    max_positions: int
    softcap: float | None = None
    shared_expert_ffn: int = 0
    linear: LinearAttention | None = None
    output_gate: bool = False
    rotary_fraction: float = 1.0
    zero_centred_norms: bool = False

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows over all tensor-parallel ranks, padded to equal shards."""
        return -(-self.vocab // tp) * tp


def described(shape: ModelShape) -> dict[str, Any]:
    """`shape` as a dict of JSON values. Leaves out fields at their default, so that a new field of ModelShape
    keeps older checkpoints readable."""
    described = {
        field.name: getattr(shape, field.name)
        for field in fields(shape)
        if getattr(shape, field.name) != field.default
    }
    if shape.linear is None:
        described |= {"layers": len(described.pop("layer_types"))}
    return json.loads(json.dumps(described, default=asdict))


def read_shape(folder: str | Path) -> ModelShape:
    """Read the shape from `folder`/config.json.

    Raises FileNotFoundError if the file is missing, ValueError naming the field if one is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: {folder} is not a Hugging Face model folder")
    try:
        return shape_of(json.loads(path.read_bytes()), str(path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    except KeyError as error:
        raise ConfigError(f"{path}: {error} is missing") from error


def shape_of(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape that the content of a config.json describes."""
    family = config.get("model_type")
    if family not in ("qwen3", "qwen3_moe", "qwen3_next"):
        raise ConfigError(f"{where}: model_type {family!r} is not supported (qwen3, qwen3_moe, qwen3_next)")
    for key, allowed in UNSUPPORTED.items():
        if key in config and config[key] not in allowed:
            raise ConfigError(f"{where}: {key}: {config[key]!r} is not supported (only {allowed[0]!r})")
    moe, hybrid = family != "qwen3", family == "qwen3_next"
    for key in SIZES + EXPERT_SIZES * moe:
        if key in config and not (isinstance(config[key], int) and config[key] > 0):
            raise ConfigError(f"{where}: {key} {config[key]!r} must be a whole number above 0")
    head_dim = _head_dim(config, hybrid)
    return ModelShape(
        family=family,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layer_types=_layer_types(config, hybrid, where),
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        ffn=config["intermediate_size"],
        experts=_experts(config) if moe else 0,
        experts_per_token=config["num_experts_per_tok"] if moe else 0,
        expert_ffn=config["moe_intermediate_size"] if moe else 0,
        norm_topk=bool(config.get("norm_topk_prob", hybrid)),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=_rope_theta(config, where),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        max_positions=config.get("max_position_embeddings", 32768),
        softcap=_softcap(config, where),
        shared_expert_ffn=config["shared_expert_intermediate_size"] if hybrid else 0,
        linear=_linear(config, where) if hybrid else None,
        output_gate=hybrid,
        rotary_fraction=_rotary_fraction(config, head_dim, 0.25 if hybrid else 1.0, where),
        zero_centred_norms=hybrid,
    )


def _head_dim(config: dict[str, Any], hybrid: bool) -> int:
    # The default is hidden_size / num_attention_heads, except for Qwen3-Next, where the key is required.
    if hybrid or config.get("head_dim"):
        return config["head_dim"]
    return config["hidden_size"] // config["num_attention_heads"]


def _layer_types(config: dict[str, Any], hybrid: bool, where: str) -> tuple[LayerType, ...]:
    """`layer_types` if given, otherwise full attention in every `full_attention_interval`-th layer of a
    hybrid model and in every layer of others."""
    layers = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        interval = config.get("full_attention_interval", 4) if hybrid else 1
        if interval < 1:
            raise ConfigError(f"{where}: full_attention_interval is {interval}, at least 1 is needed")
        types = _every(interval, layers)
    known = get_args(LayerType) if hybrid else ("full_attention",)
    if unknown := sorted(set(types) - set(known)):
        raise ConfigError(f"{where}: layer_types: {unknown[0]!r} is not supported ({', '.join(known)})")
    if len(types) != layers:
        raise ConfigError(f"{where}: layer_types names {len(types)} layers, num_hidden_layers is {layers}")
    return tuple(types)


def _every(interval: int, layers: int) -> tuple[LayerType, ...]:
    return tuple("linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers))


def _linear(config: dict[str, Any], where: str) -> LinearAttention:
    sizes = LinearAttention(
        key_heads=config["linear_num_key_heads"],
        value_heads=config["linear_num_value_heads"],
        key_dim=config["linear_key_head_dim"],
        value_dim=config["linear_value_head_dim"],
        conv=config["linear_conv_kernel_dim"],
    )
    if sizes.value_heads % sizes.key_heads:
        raise ConfigError(
            f"{where}: linear_num_value_heads ({sizes.value_heads}) must be a multiple of "
            f"linear_num_key_heads ({sizes.key_heads})"
        )
    return sizes


def _softcap(config: dict[str, Any], where: str) -> float | None:
    softcap = config.get("final_logit_softcapping")
    if softcap is not None and not softcap > 0:
        raise ConfigError(f"{where}: final_logit_softcapping {softcap!r} must be above 0, or null for none")
    return softcap


def _experts(config: dict[str, Any]) -> int:
    # transformers 5 writes `num_local_experts`; published files say `num_experts`.
    return config["num_experts"] if "num_experts" in config else config["num_local_experts"]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes all RoPE settings to `rope_parameters`; published files have separate keys.
    return config.get("rope_parameters") or config.get("rope_scaling") or {}


def _rope_theta(config: dict[str, Any], where: str) -> float:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope type {kind!r} is not supported (default)")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{where}: no rope_theta")
    return float(theta)


def _rotary_fraction(config: dict[str, Any], head_dim: int, default: float, where: str) -> float:
    fraction = _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", default))
    if int(head_dim * fraction) % 2 or not 0 < fraction <= 1:
        raise ConfigError(
            f"{where}: partial_rotary_factor {fraction} must be above 0, at most 1, and rotate an even "
            f"number of the dimensions of a head (head_dim {head_dim})"
        )
    return float(fraction)
