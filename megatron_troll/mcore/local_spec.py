"""Layers without Transformer Engine: Megatron's local linear layers, our norms and attentions."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, get_submodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_troll.mcore.attention import CachedSelfAttention, CoreAttention
from megatron_troll.mcore.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron_troll.mcore.rotary import attention_factor
from megatron_troll.mcore.router import StepBalancedRouter
from megatron_troll.mcore.shape import LayerType, ModelShape
from megatron_troll.mcore.xielu import XIELU


class RMSNorm(nn.Module):
    """weight * x / rms(x). The gradient of `weight` is summed over tensor-parallel ranks, which see
    different tokens or heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self._normed(hidden).to(hidden.dtype)

    def _normed(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """(1 + weight) * x / rms(x)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return ((1.0 + self.weight.float()) * self._normed(hidden)).to(hidden.dtype)


# Checkpoints store a norm in the linear layer after it, as Transformer Engine does: both specs read them.
NORMS = {
    "full_attention": {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    "linear_attention": {"input_layernorm.": "self_attention.in_proj.layer_norm_"},
}
DENSE_NORM = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def block_spec(shape: ModelShape, layers: Sequence[LayerType]) -> TransformerBlockSubmodules:
    """Spec of the `layers` of one pipeline stage."""
    norm: Any = _norm(shape)
    specs = {kind: layer_spec(shape, kind) for kind in set(layers)}
    return TransformerBlockSubmodules(layer_specs=[specs[kind] for kind in layers], layer_norm=norm)


def layer_spec(shape: ModelShape, kind: LayerType) -> ModuleSpec:
    """Spec of one decoder layer: attention of its kind, then experts or a dense MLP."""
    mlp: Any = get_mlp_module_spec_for_backend(
        backend=LocalSpecProvider(), num_experts=shape.experts or None, moe_grouped_gemm=False
    )
    parts: Any = get_submodules(mlp)
    if shape.experts:
        parts.router = StepBalancedRouter
    if shape.activation == "xielu":
        parts.activation_func = XIELU
    residual: Any = get_bias_dropout_add
    norm = _norm(shape)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention(shape) if kind == "full_attention" else _linear_attention(),
            self_attn_bda=residual,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=residual,
            sharded_state_dict_keys_map=NORMS[kind] | ({} if shape.experts else DENSE_NORM),
        ),
    )


def _norm(shape: ModelShape) -> type[RMSNorm]:
    return ZeroCentredRMSNorm if shape.zero_centred_norms else RMSNorm


def _attention(shape: ModelShape) -> ModuleSpec:
    """Spec of full attention."""
    core_attention: Any = CoreAttention
    norm = _norm(shape) if shape.qk_norm else None
    return ModuleSpec(
        module=CachedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, "attention_factor": attention_factor(shape)},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=core_attention,
            linear_proj=RowParallelLinear,
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _linear_attention() -> ModuleSpec:
    submodules: Any = GatedDeltaNetSubmodules(
        in_proj=ColumnParallelLinear, out_norm=RMSNorm, out_proj=RowParallelLinear
    )
    return ModuleSpec(module=GatedDeltaNet, submodules=submodules)
