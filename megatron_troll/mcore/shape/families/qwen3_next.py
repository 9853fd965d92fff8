"""Qwen3-Next: layers of gated full attention or of Gated DeltaNet, all with experts and a shared one."""

from dataclasses import replace
from typing import get_args

from megatron_troll.mcore.shape.common import decoder, layer_types
from megatron_troll.mcore.shape.experts import with_experts
from megatron_troll.mcore.shape.families import qwen3
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import LayerType, LinearAttention, ModelShape


def read(fields: Fields) -> ModelShape:
    qwen3.check(fields)
    shape = decoder(fields, fields.size("head_dim"), types=hybrid_types(fields), partial=0.25)
    return replace(
        with_experts(fields, shape, fields.size("num_experts"), norm_topk=True),
        shared_expert_ffn=fields.size("shared_expert_intermediate_size"),
        linear=linear_attention(fields),
        output_gate=True,
        zero_centred_norms=True,
    )


def hybrid_types(fields: Fields) -> tuple[LayerType, ...]:
    """`layer_types`; if absent, full attention in every `full_attention_interval`-th layer."""
    interval = fields.size("full_attention_interval", 4)
    default: tuple[LayerType, ...] = tuple(
        "linear_attention" if (i + 1) % interval else "full_attention"
        for i in range(fields.size("num_hidden_layers"))
    )
    return layer_types(fields, default, get_args(LayerType))


def linear_attention(fields: Fields) -> LinearAttention:
    """The sizes of the Gated DeltaNet layers."""
    sizes = LinearAttention(
        key_heads=fields.size("linear_num_key_heads"),
        value_heads=fields.size("linear_num_value_heads"),
        key_dim=fields.size("linear_key_head_dim"),
        value_dim=fields.size("linear_value_head_dim"),
        conv=fields.size("linear_conv_kernel_dim"),
    )
    if sizes.value_heads % sizes.key_heads:
        raise fields.error(
            f"linear_num_value_heads ({sizes.value_heads}) must be a multiple of linear_num_key_heads "
            f"({sizes.key_heads})"
        )
    return sizes
