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
HYBRID_SIZES = (
    "shared_expert_intermediate_size",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "full_attention_interval",
)
# Every layer and expert is an entry of a table.
LARGEST = {"num_hidden_layers": 1000, "num_experts": 10_000, "num_local_experts": 10_000}
LARGEST_SIZE = 2**31 - 1
# Of dense models; hidden_size / num_attention_heads in qwen3_moe, and required in qwen3_next.
DEFAULT_HEAD_DIM = 128


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
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: it holds no keys, but {str(config)[:40]!a}")
    try:
        return shape_of(config, str(path))
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
    _check_values(config, moe, hybrid, where)
    head_dim = _head_dim(config, family)
    return ModelShape(
        family=family,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layer_types=_layer_types(config, hybrid, where),
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        ffn=config["intermediate_size"],
        experts=_experts(config, hybrid) if moe else 0,
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
        rotary_fraction=_rotary_fraction(config, head_dim, where) if hybrid else _all_rotary(config, where),
        zero_centred_norms=hybrid,
    )


def _check_values(config: dict[str, Any], moe: bool, hybrid: bool, where: str) -> None:
    """Raise ConfigError naming the first key whose value is of the wrong type or does not fit the others."""
    sizes = (*SIZES, "head_dim", "max_position_embeddings", *EXPERT_SIZES * moe, *HYBRID_SIZES * hybrid)
    for key in sizes:
        if key in config and not (type(config[key]) is int and config[key] > 0):
            raise ConfigError(f"{where}: {key} {config[key]!r} must be a whole number above 0")
        most = LARGEST.get(key, LARGEST_SIZE)
        if config.get(key, 0) > most:
            raise ConfigError(f"{where}: {key} {str(config[key])[:40]} is above {most}: is it a typo?")
    for key in ("rms_norm_eps", "initializer_range"):
        if not _positive(config.get(key, 1.0)):
            raise ConfigError(f"{where}: {key} {config[key]!r} must be a number above 0")
    for key in ("tie_word_embeddings", "norm_topk_prob"):
        if type(config.get(key, False)) is not bool:
            raise ConfigError(f"{where}: {key} {config[key]!r} must be true or false")
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(key), dict | None):
            raise ConfigError(f"{where}: {key} {str(config[key])[:40]!a} must be an object or null")
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    if heads % groups:
        raise ConfigError(
            f"{where}: num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})"
        )
    if moe:
        _check_choice(config, hybrid, where)


def _check_choice(config: dict[str, Any], hybrid: bool, where: str) -> None:
    chosen, experts = config["num_experts_per_tok"], _experts(config, hybrid)
    if config.get("num_local_experts", experts) != experts:
        raise ConfigError(
            f"{where}: num_local_experts is {config['num_local_experts']}, num_experts {experts}: give one"
        )
    if chosen > experts:
        raise ConfigError(f"{where}: num_experts_per_tok is {chosen}, and there are {experts} experts")
    if chosen == 1 and config.get("norm_topk_prob", hybrid):
        raise ConfigError(
            f"{where}: num_experts_per_tok 1 with norm_topk_prob true is not supported: the weight of the "
            "only expert is always 1, so that the router cannot learn"
        )


def _positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _head_dim(config: dict[str, Any], family: str) -> int:
    if family == "qwen3_moe" and "head_dim" not in config:
        return config["hidden_size"] // config["num_attention_heads"]
    return config.get("head_dim", DEFAULT_HEAD_DIM) if family == "qwen3" else config["head_dim"]


def _layer_types(config: dict[str, Any], hybrid: bool, where: str) -> tuple[LayerType, ...]:
    """`layer_types` if given, otherwise full attention in every `full_attention_interval`-th layer of a
    hybrid model and in every layer of others."""
    layers = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        interval = config.get("full_attention_interval", 4) if hybrid else 1
        types = _every(interval, layers)
    known = get_args(LayerType) if hybrid else ("full_attention",)
    if not isinstance(types, list | tuple):
        raise ConfigError(f"{where}: layer_types {str(types)[:40]!a} must be a list")
    if unknown := [kind for kind in types if kind not in known]:
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
    if softcap is not None and not _positive(softcap):
        raise ConfigError(f"{where}: final_logit_softcapping {softcap!r} must be above 0, or null for none")
    return softcap


def _experts(config: dict[str, Any], hybrid: bool) -> int:
    # transformers 5 writes `num_local_experts` for qwen3_moe, and knows no such key in qwen3_next.
    return config["num_experts"] if hybrid or "num_experts" in config else config["num_local_experts"]


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes all RoPE settings to `rope_parameters`; published files have separate keys, which
    # it prefers.
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope_theta(config: dict[str, Any], where: str) -> float:
    rope = _rope(config)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{where}: rope type {str(kind)[:40]!a} is not supported (default)")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ConfigError(f"{where}: no rope_theta")
    if not _positive(theta):
        raise ConfigError(f"{where}: rope_theta {theta!r} must be a number above 0")
    return float(theta)


def _rotary_fraction(config: dict[str, Any], head_dim: int, where: str) -> float:
    fraction = _rope(config).get("partial_rotary_factor", config.get("partial_rotary_factor", 0.25))
    if not _positive(fraction) or fraction > 1 or int(head_dim * fraction) % 2:
        raise ConfigError(
            f"{where}: partial_rotary_factor {fraction!r} must be above 0, at most 1, and rotate an even "
            f"number of the dimensions of a head (head_dim {head_dim})"
        )
    return float(fraction)


def _all_rotary(config: dict[str, Any], where: str) -> float:
    for settings in (config, _rope(config)):
        if settings.get("partial_rotary_factor", 1.0) not in (1.0, None):
            raise ConfigError(
                f"{where}: partial_rotary_factor {settings['partial_rotary_factor']!r} is not supported: "
                f"Hugging Face ignores it in {config['model_type']}, and rotates whole heads"
            )
    return 1.0
