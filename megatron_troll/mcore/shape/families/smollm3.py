"""SmolLM3, some of whose layers rotate nothing."""

from dataclasses import replace
from typing import Any

from megatron_troll.mcore.shape.common import decoder, divided_head_dim
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape


def read(fields: Fields) -> ModelShape:
    for key in ("use_sliding_window", "attention_bias", "mlp_bias"):
        fields.only(key, False, None)
    fields.only("hidden_act", "silu")
    shape = decoder(fields, divided_head_dim(fields), tied=True)
    rotary = _rotary_layers(fields, shape.layers)
    return replace(shape, qk_norm=False, rotary_layers=() if all(rotary) else rotary)


def _rotary_layers(fields: Fields, layers: int) -> tuple[bool, ...]:
    """`no_rope_layers`, in which 1 stands for a layer that rotates; if it is absent or null, every
    `no_rope_layer_interval`-th layer does not."""
    marks: Any = fields.config.get("no_rope_layers")
    if marks is None:
        interval = fields.size("no_rope_layer_interval", 4)
        return tuple(bool((layer + 1) % interval) for layer in range(layers))
    if not isinstance(marks, list | tuple) or any(mark not in (0, 1) for mark in marks):
        raise fields.error(f"no_rope_layers {str(marks)[:40]!a} must be a list of 1 (RoPE) and 0 (none)")
    if len(marks) < layers:
        raise fields.error(f"no_rope_layers names {len(marks)} layers, num_hidden_layers is {layers}")
    return tuple(map(bool, marks[:layers]))
