"""Weight table of Qwen3-Next: layers of gated attention or Gated DeltaNet, all with a shared expert.

Hugging Face interleaves rows: `q_proj` keeps each head's query and output gate together, `in_proj_qkvz` and
`in_proj_ba` the rows of each key head. Megatron groups attention by query group, and our Gated DeltaNet layer
keeps query, key, value, z, b and a separate, so that each is sharded by heads over tensor-parallel ranks.
"""

import torch
from torch import Tensor

from megatron_troll.mcore.shape import LinearAttention, ModelShape
from megatron_troll.weights.families.parts import (
    HF,
    MEGATRON,
    MTP,
    STACKED,
    embeddings,
    experts,
    gated,
    layer_norms,
    norm,
)
from megatron_troll.weights.table import Entry, HFTensor, Table, Tensors

LINEAR = HF + "linear_attn."
IN_PROJ = (MEGATRON + "self_attention.in_proj.weight",)


def table(shape: ModelShape) -> Table:
    """The table of a Qwen3-Next model of this shape."""
    assert shape.linear is not None
    entries = (
        *embeddings(shape),
        *layer_norms(shape),
        *gated_attention(shape),
        *delta_net(shape.linear, shape.hidden, _projections(shape.linear, shape.hidden)),
        *experts(shape),
        *shared_expert(shape),
    )
    return Table(entries, shape.layer_types, shape.experts, STACKED, (MTP,))


def gated_attention(shape: ModelShape) -> tuple[Entry, ...]:
    """Full attention with an output gate."""
    hidden, groups, width = shape.hidden, shape.kv_heads, shape.head_dim
    query, key = shape.heads * width, groups * width
    hf, megatron = HF + "self_attn.", MEGATRON + "self_attention."

    def merge(tensors: Tensors) -> Tensors:
        """q with gates, k, v -> rows grouped by query group, [q.. gate.. k v] each."""
        q, gate = tensors[0].reshape(shape.heads, 2, width, hidden).unbind(1)
        grouped = [tensor.reshape(groups, -1, hidden) for tensor in (q, gate, *tensors[1:])]
        return (torch.cat(grouped, 1).reshape(-1, hidden),)

    def split(parts: Tensors) -> Tensors:
        grouped = parts[0].reshape(groups, -1, hidden)
        q, gate, k, v = grouped.split([query // groups, query // groups, width, width], 1)
        by_head = [tensor.reshape(shape.heads, width, hidden) for tensor in (q, gate)]
        return torch.stack(by_head, 1).reshape(-1, hidden), k.reshape(-1, hidden), v.reshape(-1, hidden)

    projections = tuple(
        HFTensor(f"{hf}{name}_proj.weight", (size, hidden))
        for name, size in (("q", 2 * query), ("k", key), ("v", key))
    )
    output = HFTensor(hf + "o_proj.weight", (hidden, query))
    entries = (
        Entry(projections, (megatron + "linear_qkv.weight",), merge, split, axis=0),
        norm(shape, hf + "q_norm.weight", width, megatron + "q_layernorm.weight"),
        norm(shape, hf + "k_norm.weight", width, megatron + "k_layernorm.weight"),
        Entry((output,), (megatron + "linear_proj.weight",), axis=1),
    )
    return tuple(entry.only("full_attention") for entry in entries)


def _projections(linear: LinearAttention, hidden: int) -> Entry:
    """The projections of the input of Gated DeltaNet, whose rows Hugging Face interleaves."""
    key, value, heads = linear.key_width, linear.value_width, linear.value_heads
    # Rows of one key head: query, key, value, z in one tensor, b and a in the other.
    inner = (linear.key_dim, linear.key_dim, value // linear.key_heads, value // linear.key_heads)
    outer = (heads // linear.key_heads,) * 2

    def separate(tensors: Tensors) -> Tensors:
        """qkvz, ba -> q, k, v, z, b, a."""
        return (*_by_kind(tensors[0], linear, inner), *_by_kind(tensors[1], linear, outer))

    def join(parts: Tensors) -> Tensors:
        return _by_key_head(parts[:4], linear), _by_key_head(parts[4:], linear)

    projections = (
        HFTensor(LINEAR + "in_proj_qkvz.weight", (2 * key + 2 * value, hidden)),
        HFTensor(LINEAR + "in_proj_ba.weight", (2 * heads, hidden)),
    )
    return Entry(projections, IN_PROJ, separate, join, axis=0)


def delta_net(linear: LinearAttention, hidden: int, projections: Entry) -> tuple[Entry, ...]:
    """Gated DeltaNet; `projections` of its input have the parts q, k, v, z, b, a."""
    key, value, heads = linear.key_width, linear.value_width, linear.value_heads
    megatron = MEGATRON + "self_attention."

    def cut(tensors: Tensors) -> Tensors:
        """Channels -> those of q, k and v."""
        return tensors[0].split([key, key, value])

    convolution = HFTensor(LINEAR + "conv1d.weight", (2 * key + value, 1, linear.conv))
    output = HFTensor(LINEAR + "out_proj.weight", (hidden, value))
    entries = (
        projections,
        Entry((convolution,), (megatron + "conv1d.weight",), cut, lambda parts: (torch.cat(parts),), axis=0),
        Entry((HFTensor(LINEAR + "dt_bias", (heads,), init="ones"),), (megatron + "dt_bias",), axis=0),
        Entry((HFTensor(LINEAR + "A_log", (heads,), init="decay"),), (megatron + "A_log",), axis=0),
        # Not zero-centred, unlike every other norm.
        Entry(
            (HFTensor(LINEAR + "norm.weight", (linear.value_dim,), init="ones"),),
            (megatron + "out_norm.weight",),
        ),
        Entry((output,), (megatron + "out_proj.weight",), axis=1),
    )
    return tuple(entry.only("linear_attention") for entry in entries)


def _by_kind(tensor: Tensor, linear: LinearAttention, rows: tuple[int, ...]) -> Tensors:
    """Rows grouped by key head -> all rows of each kind."""
    pieces = tensor.reshape(linear.key_heads, -1, tensor.shape[-1]).split(rows, 1)
    return tuple(piece.reshape(-1, tensor.shape[-1]) for piece in pieces)


def _by_key_head(kinds: Tensors, linear: LinearAttention) -> Tensor:
    """The inverse of `_by_kind`."""
    width = kinds[0].shape[-1]
    return torch.cat([kind.reshape(linear.key_heads, -1, width) for kind in kinds], 1).reshape(-1, width)


def shared_expert(shape: ModelShape) -> tuple[Entry, ...]:
    megatron = MEGATRON + "mlp.shared_experts."
    gate = HFTensor(HF + "mlp.shared_expert_gate.weight", (1, shape.hidden))
    first, second = megatron + "linear_fc1.weight", megatron + "linear_fc2.weight"
    return (
        Entry((gate,), (megatron + "gate_weight",)),
        *gated(HF + "mlp.shared_expert.", (first,), (second,), shape.hidden, shape.shared_expert_ffn),
    )
