"""Weight table of Qwen3 and Qwen3-MoE."""

import torch

from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.families.parts import (
    HF,
    MEGATRON,
    STACKED,
    dense,
    embeddings,
    experts,
    layer_norms,
    norm,
)
from megatron_troll.weights.table import Entry, HFTensor, Table, Tensors


def table(shape: ModelShape) -> Table:
    """The table of a Qwen3 model of this shape."""
    mlp = experts(shape) if shape.experts else dense(shape)
    entries = (*embeddings(shape), *layer_norms(shape), *_attention(shape), *mlp)
    return Table(entries, shape.layer_types, shape.experts, STACKED if shape.experts else ())


def _attention(shape: ModelShape) -> tuple[Entry, ...]:
    hidden, groups, width = shape.hidden, shape.kv_heads, shape.head_dim
    query, key = shape.heads * width, groups * width
    hf, megatron = HF + "self_attn.", MEGATRON + "self_attention."

    def merge(tensors: Tensors) -> Tensors:
        """q, k, v -> rows grouped by query group, [q.. k v] each."""
        grouped = [tensor.reshape(groups, -1, hidden) for tensor in tensors]
        return (torch.cat(grouped, 1).reshape(-1, hidden),)

    def split(parts: Tensors) -> Tensors:
        grouped = parts[0].reshape(groups, -1, hidden)
        rows = grouped.split([query // groups, width, width], 1)
        return tuple(tensor.reshape(-1, hidden) for tensor in rows)

    projections = tuple(
        HFTensor(f"{hf}{name}_proj.weight", (size, hidden))
        for name, size in (("q", query), ("k", key), ("v", key))
    )
    return (
        Entry(projections, (megatron + "linear_qkv.weight",), merge, split, axis=0),
        norm(shape, hf + "q_norm.weight", width, megatron + "q_layernorm.weight"),
        norm(shape, hf + "k_norm.weight", width, megatron + "k_layernorm.weight"),
        Entry((HFTensor(hf + "o_proj.weight", (hidden, query)),), (megatron + "linear_proj.weight",), axis=1),
    )
