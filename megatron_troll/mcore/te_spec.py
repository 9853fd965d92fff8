"""Layers on Transformer Engine, for clusters. Import this only if Transformer Engine is installed."""

from collections.abc import Sequence
from typing import Any

from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TENorm,
    TERowParallelLinear,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_troll.mcore.attention import CachedSelfAttention, CoreAttention
from megatron_troll.mcore.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_troll.mcore.local_spec import RMSNorm
from megatron_troll.mcore.rotary import attention_factor
from megatron_troll.mcore.router import StepBalancedRouter
from megatron_troll.mcore.shape import LayerType, ModelShape
from megatron_troll.mcore.xielu import XIELU


class MaskedTEAttention(TEDotProductAttention):
    """Transformer Engine's attention; generation and sequences that continue one another use ours instead."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masked = CoreAttention(*args, **kwargs)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """`inputs` as in CoreAttention: query, key, value, attention_mask."""
        packed = options.get("packed_seq_params")
        ours = packed is not None and (packed.mask is not None or packed.generation is not None)
        if ours:
            return self.masked(*inputs, packed_seq_params=packed)
        return super().forward(*inputs, **options)


def block_spec(shape: ModelShape, layers: Sequence[LayerType]) -> TransformerBlockSubmodules:
    """Spec of the `layers` of one pipeline stage, with grouped GEMM over the experts."""
    norm: Any = TENorm
    specs = {kind: layer_spec(shape, kind) for kind in set(layers)}
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in layers], layer_norm=norm)


def layer_spec(shape: ModelShape, kind: LayerType) -> ModuleSpec:
    """Spec of one decoder layer: attention of its kind, then experts or a dense MLP."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=shape.experts or None, moe_grouped_gemm=shape.experts > 0, qk_layernorm=shape.qk_norm
    )
    layer: Any = spec.submodules
    parts: Any = get_submodules(layer.mlp)
    if shape.experts:
        parts.router = StepBalancedRouter
    if shape.activation == "xielu":
        parts.activation_func = XIELU
    if kind == "linear_attention":
        submodules: Any = GatedDeltaNetSubmodules(
            in_proj=TELayerNormColumnParallelLinear, out_norm=RMSNorm, out_proj=TERowParallelLinear
        )
        layer.self_attention = ModuleSpec(module=GatedDeltaNet, submodules=submodules)
    else:
        layer.self_attention.module = CachedSelfAttention
        layer.self_attention.params["attention_factor"] = attention_factor(shape)
        layer.self_attention.submodules.core_attention = MaskedTEAttention
    return spec
