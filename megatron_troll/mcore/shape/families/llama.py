"""Llama 3, and models of its form: R1-Distill-Llama, SmolLM2."""

from dataclasses import replace

from megatron_troll.mcore.shape.common import decoder, kv_heads
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape


def read(fields: Fields) -> ModelShape:
    for key in ("attention_bias", "mlp_bias"):
        fields.only(key, False, None)
    fields.only("pretraining_tp", 1, None)
    fields.only("hidden_act", "silu")
    shape = decoder(fields, _head_dim(fields), groups=kv_heads(fields), max_positions=2048)
    return replace(shape, qk_norm=False)


def _head_dim(fields: Fields) -> int:
    if fields.config.get("head_dim") is not None:
        return fields.size("head_dim")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    if hidden % heads:
        raise fields.error(f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads})")
    return hidden // heads
