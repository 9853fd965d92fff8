"""Megatron's TransformerConfig for one of our models."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_troll.config import Model
from megatron_troll.mcore.layout import uses_te
from megatron_troll.mcore.shape import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Megatron's flex dispatcher uses DeepEP by default.
DISPATCHERS: dict[str, Any] = {"alltoall": "alltoall", "allgather": "allgather", "deepep": "flex"}


def transformer_config(model: Model, shape: ModelShape) -> TransformerConfig:
    """Megatron's configuration. Losses are sums (calculate_per_token_loss): our loss weights contain the
    normalisation, so that it does not depend on the layout."""
    layout, dtype = model.layout, DTYPES[model.dtype]
    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        gated_linear_unit=shape.gated,
        activation_func=F.silu,
        # Megatron then builds a module per layer from the spec (its name is Transformer Engine's).
        use_te_activation_func=shape.activation == "xielu",
        no_rope_freq=[int(not rotates) for rotates in shape.rotary_layers] or None,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_moe_experts=shape.experts or None,
        moe_ffn_hidden_size=shape.expert_ffn or None,
        moe_router_topk=shape.experts_per_token or 2,
        moe_router_pre_softmax=not shape.norm_topk,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type=DISPATCHERS[model.moe.dispatcher],
        moe_grouped_gemm=uses_te(model.spec) and shape.experts > 0,
        moe_shared_expert_intermediate_size=shape.shared_expert_ffn or None,
        moe_shared_expert_gate=shape.shared_expert_ffn > 0,
        attention_output_gate=shape.output_gate,
        layernorm_zero_centered_gamma=shape.zero_centred_norms,
        **_linear_attention(shape),
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        calculate_per_token_loss=True,
        # With two interleaved stages, each is the other's next and previous: batched messages would mix.
        batch_p2p_comm=layout.vpp is None,
        overlap_p2p_comm=layout.vpp is not None,
        use_cpu_initialization=True,
        perform_initialization=False,
        transformer_impl="transformer_engine" if uses_te(model.spec) else "local",
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **_recompute(model),
    )
    # Micro-batches differ in length. Set here, because the constructor refuses it with Megatron's all-gather
    # dispatcher, which we replace with one that allows it (dispatch.py).
    config.variable_seq_lengths = True
    return config


def _linear_attention(shape: ModelShape) -> dict[str, Any]:
    if shape.linear is None:
        return {}
    return {
        # A list, so that checkpoints store each layer under its own name if there are several types.
        "linear_attention_freq": [int(kind == "linear_attention") for kind in shape.layer_types],
        "linear_num_key_heads": shape.linear.key_heads,
        "linear_num_value_heads": shape.linear.value_heads,
        "linear_key_head_dim": shape.linear.key_dim,
        "linear_value_head_dim": shape.linear.value_dim,
        "linear_conv_kernel_dim": shape.linear.conv,
    }


def _recompute(model: Model) -> dict[str, Any]:
    if model.recompute == "none":
        return {}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
