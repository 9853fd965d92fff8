"""Megatron's TransformerConfig for one of our models, and the layouts that are refused."""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_troll.config.tree import Layout, Model
from megatron_troll.mcore.shape import ModelShape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def uses_te(spec: str) -> bool:
    """Whether `spec` (auto, local, te) means Transformer Engine here: auto takes it where CUDA and it exist.

    Raises ValueError when it is asked for and missing.
    """
    present = torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
    if spec == "te" and not present:
        raise ValueError("models.*.spec=te needs CUDA and transformer_engine; use spec=local or spec=auto")
    return spec != "local" and present


def check_layout(shape: ModelShape, layout: Layout) -> None:
    """Raise ValueError naming the first size that cannot be cut as `layout` asks."""
    stages = layout.pp * (layout.vpp or 1)
    rules = (
        (shape.heads, layout.tp, "attention heads", "tp"),
        (shape.kv_heads, layout.tp, "key-value heads", "tp"),
        (shape.ffn, layout.tp, "the feed-forward size", "tp"),
        (shape.layers, stages, "layers", "pp x vpp"),
        (shape.experts, layout.ep, "experts", "ep"),
        (shape.expert_ffn, layout.etp, "the expert feed-forward size", "etp"),
    )
    for size, parts, what, axis in rules:
        if size % parts:
            raise ValueError(f"{what} ({size}) cannot be divided by {axis} ({parts})")
    if layout.vpp is not None and (layout.pp < 2 or layout.vpp < 2):
        raise ValueError(
            f"vpp={layout.vpp} needs vpp >= 2 and pp >= 2 (pp is {layout.pp}); leave vpp out otherwise"
        )
    if not shape.experts and (layout.ep > 1 or layout.etp > 1):
        raise ValueError(f"ep={layout.ep} and etp={layout.etp} need a model with experts")
    if shape.experts and layout.tp > 1 and layout.ep == 1 and layout.etp == 1:
        raise ValueError(
            "tp > 1 with ep = 1 and etp = 1 gives wrong expert gradients in megatron-core 0.16.1 (they are "
            "not summed over the tensor-parallel ranks): set ep or etp above 1"
        )


def transformer_config(model: Model, shape: ModelShape) -> TransformerConfig:
    """Megatron's configuration. Losses are sums (calculate_per_token_loss): our weights carry the
    normalisation, so that no layout changes it."""
    layout, dtype = model.layout, DTYPES[model.dtype]
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        qk_layernorm=True,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        num_moe_experts=shape.experts or None,
        moe_ffn_hidden_size=shape.expert_ffn or None,
        moe_router_topk=shape.experts_per_token or 2,
        moe_router_pre_softmax=not shape.norm_topk,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type=model.dispatcher,
        moe_grouped_gemm=uses_te(model.spec) and shape.experts > 0,
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
        variable_seq_lengths=True,
        calculate_per_token_loss=True,
        batch_p2p_comm=True,
        use_cpu_initialization=True,
        perform_initialization=False,
        transformer_impl="transformer_engine" if uses_te(model.spec) else "local",
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        **_recompute(model.recompute),
    )


def _recompute(mode: str) -> dict[str, Any]:
    if mode == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    return {} if mode == "none" else {"recompute_granularity": "selective"}
