"""Apertus: an MLP without a gate, with xIELU."""

from dataclasses import replace

from megatron_troll.mcore.shape.common import decoder, divided_head_dim, kv_heads
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape
from megatron_troll.mcore.shape.rope import settings


def read(fields: Fields) -> ModelShape:
    for key in ("attention_bias", "mlp_bias", "post_norm"):
        fields.only(key, False, None)
    fields.only("qk_norm", True, None)
    fields.only("hidden_act", "xielu")
    if not settings(fields).config:
        raise fields.error(
            "neither rope_parameters nor rope_scaling says how positions are rotated, and programs differ "
            "(transformers 5: llama3 with theta 12,000,000, whatever rope_theta says): give rope_parameters"
        )
    shape = decoder(
        fields,
        divided_head_dim(fields),
        groups=kv_heads(fields),
        norm_eps=1e-5,
        max_positions=65536,
    )
    return replace(shape, activation="xielu")
