"""Names of Megatron's parameters on Transformer Engine, which runs on CUDA only: recorded from the sources of
megatron-core 0.16.1.

gpt_layer_specs.py  get_gpt_layer_with_transformer_engine_spec: which linear layers hold a norm
extensions/transformer_engine.py  TELayerNormColumnParallelLinear: `layer_norm_weight`; TEGroupedLinear: one
                    `weight{e}` an expert
moe/experts.py      TEGroupedMLP (grouped GEMM), SequentialMLP; also moe/shared_experts.py, moe/router.py
"""

from typing import Any

from tests.dist.tiny import DENSE, MOE, NEXT
from tests.dist.tiny_families import APERTUS, LLAMA, QWEN2, QWEN3_5_MOE, QWEN3_5_TEXT

OUTSIDE = (
    "embedding.word_embeddings.weight",
    "decoder.final_layernorm.weight",
    "output_layer.weight",
)
ATTENTION = (
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.q_layernorm.weight",
    "self_attention.k_layernorm.weight",
    "self_attention.linear_proj.weight",
)
DELTA_NET = (
    "self_attention.in_proj.layer_norm_weight",
    "self_attention.in_proj.weight",
    "self_attention.conv1d.weight",
    "self_attention.dt_bias",
    "self_attention.A_log",
    "self_attention.out_norm.weight",
    "self_attention.out_proj.weight",
)
WITHOUT_NORMS = tuple(name for name in ATTENTION if "k_layernorm" not in name and "q_layernorm" not in name)
BIASED = (*WITHOUT_NORMS, "self_attention.linear_qkv.bias")
XIELU = tuple(f"mlp.activation_func.{name}" for name in ("alpha_p", "alpha_n", "beta", "eps"))
MLP = ("mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")
ROUTER = ("pre_mlp_layernorm.weight", "mlp.router.weight")
GROUPED = ("mlp.experts.linear_fc1.weight{e}", "mlp.experts.linear_fc2.weight{e}")
SEQUENTIAL = (
    "mlp.experts.local_experts.{e}.linear_fc1.weight",
    "mlp.experts.local_experts.{e}.linear_fc2.weight",
)
SHARED = (
    "mlp.shared_experts.linear_fc1.weight",
    "mlp.shared_experts.linear_fc2.weight",
    "mlp.shared_experts.gate_weight",
)

Layers = dict[str, tuple[str, ...]]
# A model's config.json, and the parameters of each type of layer it has.
MODELS: dict[str, tuple[dict[str, Any], Layers]] = {
    "dense": (DENSE, {"full_attention": ATTENTION + MLP}),
    "llama": (LLAMA, {"full_attention": WITHOUT_NORMS + MLP}),
    "qwen2": (QWEN2 | {"tie_word_embeddings": False}, {"full_attention": BIASED + MLP}),
    "apertus": (APERTUS, {"full_attention": ATTENTION + MLP + XIELU}),
    "grouped": (MOE, {"full_attention": ATTENTION + ROUTER + GROUPED}),
    "sequential": (MOE, {"full_attention": ATTENTION + ROUTER + SEQUENTIAL}),
    "hybrid": (
        NEXT,
        {
            "full_attention": ATTENTION + ROUTER + GROUPED + SHARED,
            "linear_attention": DELTA_NET + ROUTER + GROUPED + SHARED,
        },
    ),
    "dense hybrid": (
        QWEN3_5_TEXT,
        {"full_attention": ATTENTION + MLP, "linear_attention": DELTA_NET + MLP},
    ),
    "hybrid beside vision": (
        QWEN3_5_MOE,
        {
            "full_attention": ATTENTION + ROUTER + GROUPED + SHARED,
            "linear_attention": DELTA_NET + ROUTER + GROUPED + SHARED,
        },
    ),
}
