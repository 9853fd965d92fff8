"""The metadata of a GGUF file, and the config.json that it describes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from megatron_troll.config import ConfigError

# Keys of an architecture that config.json takes over; another key may change the model, and is refused.
READ = {
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "vocab_size",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
}
# The settings of Llama 3's RoPE scaling that GGUF files hold only as one factor a frequency.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_FACTORS = (8.0, 16.0, 32.0)
ROPE_FACTORS = "rope_freqs.weight"


@dataclass(frozen=True)
class Architecture:
    """A model family in GGUF. `model_type` and `classes` name it in config.json, `fixed` are keys of
    config.json that its GGUF files leave out. pairs: whether rows of queries and keys are stored in the order
    of llama.cpp's RoPE, which rotates neighbours."""

    model_type: str
    classes: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    pairs: bool = False


# By general.architecture.
ARCHITECTURES = {
    "llama": Architecture(
        "llama", "LlamaForCausalLM", {"attention_bias": False, "mlp_bias": False}, pairs=True
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", {"use_sliding_window": False}),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", {"attention_bias": False}),
    "qwen3moe": Architecture(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"attention_bias": False, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    ),
    "smollm3": Architecture(
        "smollm3",
        "SmolLM3ForCausalLM",
        {"attention_bias": False, "mlp_bias": False, "no_rope_layer_interval": 4},
        pairs=True,
    ),
}


class GGUFFile:
    """An open GGUF file. Raises ConfigError if it is none, is cut off, or holds a family that is not
    supported."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in self._reader.fields.items()}
        except FileNotFoundError:
            raise
        except (OSError, ValueError, IndexError, KeyError, OverflowError) as error:
            raise ConfigError(f"{path} is not a whole GGUF file ({error}): download it again") from error
        self.tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture = self._architecture()

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; of an architecture's, if it begins with a point."""
        return self._fields.get(self._full(key), default)

    def __getitem__(self, key: str) -> Any:
        if self._full(key) not in self._fields:
            raise ConfigError(f"{self.path}: {self._full(key)} is missing")
        return self._fields[self._full(key)]

    def number(self, key: str) -> float:
        """The shortest decimal number that is the key's float32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self[key])))

    def own_keys(self) -> Iterator[str]:
        """The keys of the architecture, without its name."""
        prefix = f"{self._name}."
        yield from (key.removeprefix(prefix) for key in self._fields if key.startswith(prefix))

    def _full(self, key: str) -> str:
        return f"{self._name}{key}" if key.startswith(".") else key

    def _architecture(self) -> Architecture:
        self._name = str(self._fields.get("general.architecture"))
        if self._name not in ARCHITECTURES:
            raise ConfigError(
                f"{self.path}: general.architecture {self._name!r} is not supported "
                f"({', '.join(ARCHITECTURES)})"
            )
        return ARCHITECTURES[self._name]


def config_of(file: GGUFFile) -> dict[str, Any]:
    """The content of config.json. Raises ConfigError naming a key that is missing or cannot be honoured."""
    if unknown := sorted(set(file.own_keys()) - READ):
        raise ConfigError(f"{file.path}: {unknown[0]} = {file.get('.' + unknown[0])!r} is not supported")
    heads, hidden = file[".attention.head_count"], file[".embedding_length"]
    head_dim = file.get(".attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(f".{key}", head_dim) != head_dim:
            raise ConfigError(f"{file.path}: {key} {file['.' + key]} is not the size of a head ({head_dim})")
    config = {
        "architectures": [file.architecture.classes],
        "model_type": file.architecture.model_type,
        "vocab_size": len(file["tokenizer.ggml.tokens"]),
        "hidden_size": hidden,
        "num_hidden_layers": file[".block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": file.get(".attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": file[".feed_forward_length"],
        "hidden_act": "silu",
        "max_position_embeddings": file[".context_length"],
        "rms_norm_eps": file.number(".attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(file, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **_experts(file),
        **file.architecture.fixed,
    }
    # Also those that the file lacks: an absent key would mean the family's default, such as 128004.
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = file.get(f"tokenizer.ggml.{theirs}_token_id")
    return config


def _experts(file: GGUFFile) -> dict[str, Any]:
    if not file.get(".expert_count"):
        return {}
    return {
        "num_experts": file[".expert_count"],
        "num_experts_per_tok": file[".expert_used_count"],
        "moe_intermediate_size": file[".expert_feed_forward_length"],
    }


def _rope(file: GGUFFile, head_dim: int) -> dict[str, Any]:
    rope = {"rope_theta": file.number(".rope.freq_base"), "rope_type": "default"}
    kind = file.get(".rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors:
        rope |= _llama3(file, rope["rope_theta"], head_dim)
    elif kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": file.number(".rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = file[".rope.scaling.original_context_length"]
    elif kind != "none":
        raise ConfigError(f"{file.path}: rope.scaling.type {kind!r} is not supported (none, linear, yarn)")
    return rope


def _llama3(file: GGUFFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3's settings whose factors are those of the file. Raises ConfigError if none are."""
    found = np.asarray(file.tensors[ROPE_FACTORS].data, dtype=np.float64).reshape(-1)
    for factor in LLAMA3_FACTORS:
        expected = _factors(factor, theta, head_dim)
        if found.shape == expected.shape and np.allclose(found, expected, rtol=1e-5):
            return {"rope_type": "llama3", "factor": factor, **LLAMA3}
    raise ConfigError(
        f"{file.path}: {ROPE_FACTORS} holds none of the RoPE scalings of Llama 3 "
        f"(factors {', '.join(f'{factor:g}' for factor in LLAMA3_FACTORS)})"
    )


def _factors(factor: float, theta: float, head_dim: int) -> np.ndarray:
    """The factor by which Llama 3's scaling slows each pair of dimensions, [head_dim / 2]."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = LLAMA3["original_max_position_embeddings"] / wavelengths
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - kept) / factor + kept)
