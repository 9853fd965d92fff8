"""Weight tables of Qwen3.5 and 3.6: Qwen3-Next with the projections of linear attention apart, dense or with
experts, under the names of the language model alone or of one with a vision tower."""

from dataclasses import replace

import torch

from megatron_troll.mcore.shape import LinearAttention, ModelShape
from megatron_troll.weights.families.parts import (
    MTP,
    STACKED,
    VISION,
    dense,
    embeddings,
    experts,
    layer_norms,
)
from megatron_troll.weights.families.qwen3_next import (
    IN_PROJ,
    LINEAR,
    delta_net,
    gated_attention,
    shared_expert,
)
from megatron_troll.weights.table import Entry, HFTensor, Table, Tensors


def table(shape: ModelShape) -> Table:
    """The table of a language model alone."""
    assert shape.linear is not None
    mlp = (*experts(shape), *shared_expert(shape)) if shape.experts else dense(shape)
    entries = (
        *embeddings(shape),
        *layer_norms(shape),
        *gated_attention(shape),
        *delta_net(shape.linear, shape.hidden, _projections(shape.linear, shape.hidden)),
        *mlp,
    )
    return Table(entries, shape.layer_types, shape.experts, STACKED if shape.experts else (), (MTP,))


def table_beside_vision(shape: ModelShape) -> Table:
    """The table of the language model of one with a vision tower."""
    renamed = table(shape).renamed("model.", "model.language_model.")
    return replace(renamed, carried=(MTP, VISION))


def _projections(linear: LinearAttention, hidden: int) -> Entry:
    """The projections of the input of Gated DeltaNet: query, key and value in one tensor, z, b, a."""
    key, value, heads = linear.key_width, linear.value_width, linear.value_heads

    def separate(tensors: Tensors) -> Tensors:
        """qkv, z, b, a -> q, k, v, z, b, a."""
        return (*tensors[0].split([key, key, value]), *tensors[1:])

    def join(parts: Tensors) -> Tensors:
        return (torch.cat(parts[:3]), *parts[3:])

    sizes = (("qkv", 2 * key + value), ("z", value), ("b", heads), ("a", heads))
    projections = tuple(HFTensor(f"{LINEAR}in_proj_{name}.weight", (rows, hidden)) for name, rows in sizes)
    return Entry(projections, IN_PROJ, separate, join, axis=0)
