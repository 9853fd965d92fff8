"""Readers of config.json, by its `model_type`. A family is one file here, and one in weights/families/."""

from collections.abc import Callable

from megatron_troll.mcore.shape.families import apertus, llama, qwen2, qwen3, qwen3_5, qwen3_next, smollm3
from megatron_troll.mcore.shape.fields import Fields
from megatron_troll.mcore.shape.model_shape import ModelShape

READERS: dict[str, Callable[[Fields], ModelShape]] = {
    "apertus": apertus.read,
    "llama": llama.read,
    "qwen2": qwen2.read,
    "qwen3": qwen3.read,
    "qwen3_5": qwen3_5.read,
    "qwen3_5_moe": qwen3_5.read,
    "qwen3_5_moe_text": qwen3_5.read,
    "qwen3_5_text": qwen3_5.read,
    "qwen3_moe": qwen3.read_moe,
    "qwen3_next": qwen3_next.read,
    "smollm3": smollm3.read,
}
