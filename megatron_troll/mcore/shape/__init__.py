"""The sizes of a model, read from its Hugging Face config.json: one reader per family (families/)."""

from megatron_troll.mcore.shape.model_shape import LayerType, LinearAttention, ModelShape, described
from megatron_troll.mcore.shape.read import read_shape, shape_of
from megatron_troll.mcore.shape.rope import Linear, Llama3, RopeScaling, Yarn

__all__ = [
    "LayerType",
    "Linear",
    "LinearAttention",
    "Llama3",
    "ModelShape",
    "RopeScaling",
    "Yarn",
    "described",
    "read_shape",
    "shape_of",
]
