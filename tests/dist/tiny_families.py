"""Hugging Face configs of a tiny model of each family, and of each scaling of rotary frequencies."""

from typing import Any

from tests.dist.tiny import DENSE, MOE, NEXT

# Of three pairs of dimensions one turns fast enough to be kept, one is between, one is slowed down.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 0.5,
}
COMMON = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,  # Hugging Face gives the embedding of a padding token no gradient
}
LLAMA = COMMON | {"model_type": "llama", "num_key_value_heads": 4, "rope_parameters": LLAMA3}
# As in SmolLM2, no scaling; as in Llama 1, a key-value head per query head.
LLAMA_TIED = COMMON | {
    "model_type": "llama",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}
QWEN2 = COMMON | {
    "model_type": "qwen2",
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SMOLLM3 = COMMON | {
    "model_type": "smollm3",
    "num_key_value_heads": 4,
    "no_rope_layers": [1, 0, 0, 1],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
APERTUS = COMMON | {
    "model_type": "apertus",
    "num_key_value_heads": 4,
    "hidden_act": "xielu",
    "rope_parameters": LLAMA3,
}
QWEN3_YARN = DENSE | {"rope_parameters": YARN}
MOE_YARN = MOE | {"rope_parameters": YARN | {"attention_factor": 1.3, "truncate": False}}
NEXT_LINEAR = NEXT | {
    "rope_parameters": NEXT["rope_parameters"] | {"rope_type": "linear", "factor": 2.0},
}
# Of two layers each of both kinds; text at equal positions on three axes.
QWEN3_5 = {
    key: value
    for key, value in NEXT.items()
    if key not in ("intermediate_size", "norm_topk_prob", "use_sliding_window")
} | {
    "head_dim": 32,
    "rope_parameters": YARN
    | {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    "router_aux_loss_coef": 0.001,
}
DENSE_ONLY = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "router_aux_loss_coef")
QWEN3_5_TEXT = {
    key: value
    for key, value in QWEN3_5.items()
    if key not in (*DENSE_ONLY, "shared_expert_intermediate_size")
} | {
    "model_type": "qwen3_5_text",
    "intermediate_size": 80,
    "rope_parameters": QWEN3_5["rope_parameters"] | {"rope_type": "default", "rope_theta": 1e4},
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "patch_size": 4,
}
QWEN3_5_MOE = {
    "model_type": "qwen3_5_moe",
    "text_config": QWEN3_5 | {"model_type": "qwen3_5_moe_text"},
    "vision_config": VISION,
    "tie_word_embeddings": False,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": LLAMA_TIED,
    "qwen2": QWEN2,
    "smollm3": SMOLLM3,
    "apertus": APERTUS,
    "qwen3-yarn": QWEN3_YARN,
    "qwen3_moe-yarn": MOE_YARN,
    "qwen3_next-linear": NEXT_LINEAR,
    "qwen3_5_text": QWEN3_5_TEXT,
    "qwen3_5_moe-yarn": QWEN3_5_MOE,
}
