"""The tables of the model families, by Hugging Face `model_type`."""

from megatron_troll.config import ConfigError
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.families import apertus, qwen3_5, qwen3_next, standard
from megatron_troll.weights.table import Table

FAMILIES = {
    "apertus": apertus.table,
    "llama": standard.table,
    "qwen2": standard.table,
    "qwen3": standard.table,
    "qwen3_5": qwen3_5.table_beside_vision,
    "qwen3_5_moe": qwen3_5.table_beside_vision,
    "qwen3_5_moe_text": qwen3_5.table,
    "qwen3_5_text": qwen3_5.table,
    "qwen3_moe": standard.table,
    "qwen3_next": qwen3_next.table,
    "smollm3": standard.table,
}


def table_of(shape: ModelShape) -> Table:
    """The table of a model. Raises ConfigError naming the families that have one."""
    if shape.family not in FAMILIES:
        raise ConfigError(f"no weight table for model_type {shape.family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[shape.family](shape)
