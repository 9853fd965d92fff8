"""Qwen3 and Qwen3-MoE."""

import torch

from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.table import Entry, HFTensor, Stacked, Table, Tensors

HF = "model.layers.{l}."
MEGATRON = "decoder.layers.{l}."


def table(shape: ModelShape) -> Table:
    """The table of a Qwen3 model of this shape."""
    mlp = _experts(shape) if shape.experts else _dense(shape)
    entries = (*_embeddings(shape), *_attention(shape), *mlp)
    return Table(entries, shape.layers, shape.experts, STACKED if shape.experts else ())


STACKED = (
    Stacked(
        HF + "mlp.experts.gate_up_proj",
        (HF + "mlp.experts.{e}.gate_proj.weight", HF + "mlp.experts.{e}.up_proj.weight"),
    ),
    Stacked(HF + "mlp.experts.down_proj", (HF + "mlp.experts.{e}.down_proj.weight",)),
)


def _embeddings(shape: ModelShape) -> tuple[Entry, ...]:
    rows = (shape.vocab, shape.hidden)
    embedding = HFTensor("model.embed_tokens.weight", rows)
    head = embedding if shape.tied else HFTensor("lm_head.weight", rows)
    return (
        Entry((embedding,), ("embedding.word_embeddings.weight",), axis=0, padded=True),
        _norm("model.norm.weight", shape.hidden, "decoder.final_layernorm.weight"),
        # A tied head is a parameter of its own only where another pipeline stage holds the embedding.
        Entry((head,), ("output_layer.weight",), axis=0, padded=True, copy=shape.tied),
    )


def _norm(hf: str, size: int, *megatron: str) -> Entry:
    return Entry((HFTensor(hf, (size,), init="ones"),), megatron)


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
        _norm(
            HF + "input_layernorm.weight",
            hidden,
            MEGATRON + "input_layernorm.weight",
            megatron + "linear_qkv.layer_norm_weight",
        ),
        Entry(projections, (megatron + "linear_qkv.weight",), merge, split, axis=0),
        _norm(hf + "q_norm.weight", width, megatron + "q_layernorm.weight"),
        _norm(hf + "k_norm.weight", width, megatron + "k_layernorm.weight"),
        Entry((HFTensor(hf + "o_proj.weight", (hidden, query)),), (megatron + "linear_proj.weight",), axis=1),
        _norm(
            HF + "post_attention_layernorm.weight",
            hidden,
            MEGATRON + "pre_mlp_layernorm.weight",
            MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        ),
    )


def _dense(shape: ModelShape) -> tuple[Entry, ...]:
    return _gated(
        HF + "mlp.",
        (MEGATRON + "mlp.linear_fc1.weight",),
        (MEGATRON + "mlp.linear_fc2.weight",),
        shape.hidden,
        shape.ffn,
    )


def _experts(shape: ModelShape) -> tuple[Entry, ...]:
    experts = MEGATRON + "mlp.experts."
    router = HFTensor(HF + "mlp.gate.weight", (shape.experts, shape.hidden))
    first, second = (
        (f"{experts}local_experts.{{e}}.{layer}.weight", f"{experts}{layer}.weight{{e}}")
        for layer in ("linear_fc1", "linear_fc2")
    )
    gated = _gated(HF + "mlp.experts.{e}.", first, second, shape.hidden, shape.expert_ffn)
    return (Entry((router,), (MEGATRON + "mlp.router.weight",)), *gated)


def _gated(
    hf: str, first: tuple[str, ...], second: tuple[str, ...], hidden: int, ffn: int
) -> tuple[Entry, Entry]:
    """down(silu(gate x) * up x); Megatron keeps gate and up in one matrix."""
    gate, up = (HFTensor(f"{hf}{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
    down = HFTensor(hf + "down_proj.weight", (hidden, ffn))
    return Entry((gate, up), first, axis=0), Entry((down,), second, axis=1)
