"""Qwen2.5, whose projections to queries, keys and values have biases that no key names."""

from dataclasses import replace

from megatron_troll.mcore.shape.common import decoder, divided_head_dim
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape


def read(fields: Fields) -> ModelShape:
    fields.only("use_sliding_window", False, None)
    fields.only("hidden_act", "silu")
    return replace(decoder(fields, divided_head_dim(fields)), qk_norm=False, qkv_bias=True)
