"""Layers on Transformer Engine, for clusters. Import only where Transformer Engine is installed."""

from typing import Any

from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from megatron_troll.mcore.attention import CachedSelfAttention, CoreAttention
from megatron_troll.mcore.router import StepBalancedRouter


class MaskedTEAttention(TEDotProductAttention):
    """Transformer Engine's attention; generation, which hides the left padding by a mask, takes ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.masked = CoreAttention(*args, **kwargs)

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """`inputs` are those of CoreAttention: query, key, value, attention_mask."""
        masked = inputs[3] is not None
        return self.masked(*inputs) if masked else super().forward(*inputs, **options)


def block_spec(experts: int, layers: int) -> TransformerBlockSubmodules:
    """The `layers` layers of one pipeline stage, grouped GEMM over the experts."""
    spec = get_gpt_layer_with_transformer_engine_spec(
        num_experts=experts or None, moe_grouped_gemm=experts > 0, qk_layernorm=True
    )
    layer: Any = spec.submodules
    layer.self_attention.module = CachedSelfAttention
    layer.self_attention.submodules.core_attention = MaskedTEAttention
    if experts:
        layer.mlp.submodules.router = StepBalancedRouter
    norm: Any = TENorm
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm)
