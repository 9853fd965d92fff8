"""What a Hugging Face config.json says about a Qwen3 or Qwen3-MoE model, by Megatron's names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one model. experts is 0 for a dense model; `vocab` is the published size, unpadded; logits are
    softcap * tanh(x / softcap) where there is a soft-cap."""

    family: str
    vocab: int
    hidden: int
    layers: int
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
    softcap: float | None

    def padded_vocab(self, tp: int) -> int:
        """Vocabulary rows over all tensor-parallel ranks: equal shards."""
        return -(-self.vocab // tp) * tp


def read_shape(folder: str | Path) -> ModelShape:
    """The shape in `folder`/config.json.

    Raises FileNotFoundError without the file, ValueError naming the field for what is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: models.*.path must be a Hugging Face model folder")
    try:
        return shape_of(json.loads(path.read_bytes()), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    except KeyError as error:
        raise ValueError(f"{path}: {error} is missing") from error


def shape_of(config: dict[str, Any], where: str = "config.json") -> ModelShape:
    """The shape in a config.json's content."""
    family = config.get("model_type")
    if family not in ("qwen3", "qwen3_moe"):
        raise ValueError(f"{where}: model_type {family!r} is not supported (qwen3, qwen3_moe)")
    moe = family == "qwen3_moe"
    if moe and (config.get("decoder_sparse_step", 1) != 1 or config.get("mlp_only_layers")):
        raise ValueError(f"{where}: dense layers between expert layers are not supported")
    if config.get("use_sliding_window") or config.get("attention_bias"):
        raise ValueError(f"{where}: sliding windows and attention biases are not supported")
    return ModelShape(
        family=family,
        vocab=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        ffn=config["intermediate_size"],
        experts=_experts(config) if moe else 0,
        experts_per_token=config["num_experts_per_tok"] if moe else 0,
        expert_ffn=config["moe_intermediate_size"] if moe else 0,
        norm_topk=bool(config.get("norm_topk_prob", False)),
        tied=bool(config.get("tie_word_embeddings", False)),
        rope_theta=_rope_theta(config, where),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        init_std=config.get("initializer_range", 0.02),
        max_positions=config.get("max_position_embeddings", 32768),
        softcap=_softcap(config, where),
    )


def _softcap(config: dict[str, Any], where: str) -> float | None:
    softcap = config.get("final_logit_softcapping")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{where}: final_logit_softcapping {softcap!r} must be above 0, or null for none")
    return softcap


def _experts(config: dict[str, Any]) -> int:
    # transformers 5 writes `num_local_experts`; published files say `num_experts`.
    return config["num_experts"] if "num_experts" in config else config["num_local_experts"]


def _rope_theta(config: dict[str, Any], where: str) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{where}: rope type {kind!r} is not supported (default)")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{where}: no rope_theta")
    return float(theta)
