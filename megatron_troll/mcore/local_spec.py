"""Layers without Transformer Engine: Megatron's local linear layers, our RMSNorm and core attention."""

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_troll.mcore.attention import CachedSelfAttention, CoreAttention
from megatron_troll.mcore.router import StepBalancedRouter


class RMSNorm(nn.Module):
    """RMSNorm in fp32 that also knows sequence parallelism, which Megatron's torch wrapper refuses."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


def layer_spec(experts: int) -> ModuleSpec:
    """One Qwen3 decoder layer: QK-norm attention, then experts (0: a dense gated MLP)."""
    backend = LocalSpecProvider()
    mlp: Any = get_mlp_module_spec_for_backend(
        backend=backend, num_experts=experts or None, moe_grouped_gemm=False
    )
    if experts:
        mlp.submodules.router = StepBalancedRouter
    residual: Any = get_bias_dropout_add
    core_attention: Any = CoreAttention
    attention = ModuleSpec(
        module=CachedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=core_attention,
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=RMSNorm,
            k_layernorm=RMSNorm,
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=residual,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=residual,
        ),
    )


def block_spec(experts: int, layers: int) -> TransformerBlockSubmodules:
    """The `layers` layers of one pipeline stage."""
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer_spec(experts)] * layers, layer_norm=norm)
