"""Weight table of the families that name tensors as Llama does: also Qwen2.5, SmolLM3 and Qwen3, with experts
or without."""

from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.families.parts import STACKED, attention, dense, embeddings, experts, layer_norms
from megatron_troll.weights.table import Table


def table(shape: ModelShape) -> Table:
    """The table of a model of this shape."""
    mlp = experts(shape) if shape.experts else dense(shape)
    entries = (*embeddings(shape), *layer_norms(shape), *attention(shape), *mlp)
    return Table(entries, shape.layer_types, shape.experts, STACKED if shape.experts else ())
