"""The parts that families have in common."""

import torch

from megatron_troll.mcore.shape import ModelShape
from megatron_troll.weights.table import Entry, HFTensor, Stacked, Tensors

HF = "model.layers.{l}."
MEGATRON = "decoder.layers.{l}."
# Beginnings of the names of multi-token prediction and of a vision tower: neither is built nor trained here.
MTP, VISION = "mtp.", "model.visual."

STACKED = (
    Stacked(
        HF + "mlp.experts.gate_up_proj",
        (HF + "mlp.experts.{e}.gate_proj.weight", HF + "mlp.experts.{e}.up_proj.weight"),
    ),
    Stacked(HF + "mlp.experts.down_proj", (HF + "mlp.experts.{e}.down_proj.weight",)),
)


def embeddings(shape: ModelShape) -> tuple[Entry, ...]:
    rows = (shape.vocab, shape.hidden)
    embedding = HFTensor("model.embed_tokens.weight", rows)
    head = embedding if shape.tied else HFTensor("lm_head.weight", rows)
    return (
        Entry((embedding,), ("embedding.word_embeddings.weight",), axis=0, padded=True),
        norm(shape, "model.norm.weight", shape.hidden, "decoder.final_layernorm.weight"),
        # A tied head is a parameter of its own only if another pipeline stage holds the embedding.
        Entry((head,), ("output_layer.weight",), axis=0, padded=True, copy=shape.tied),
    )


def norm(shape: ModelShape, hf: str, size: int, *megatron: str) -> Entry:
    start = "zeros" if shape.zero_centred_norms else "ones"
    return Entry((HFTensor(hf, (size,), init=start),), megatron)


def layer_norms(
    shape: ModelShape, before_attention: str = "input_layernorm", before_mlp: str = "post_attention_layernorm"
) -> tuple[Entry, ...]:
    """The two norms of a layer; Transformer Engine keeps each in the linear layer that follows it."""
    attention = MEGATRON + "self_attention."
    return (
        norm(
            shape,
            f"{HF}{before_attention}.weight",
            shape.hidden,
            MEGATRON + "input_layernorm.weight",
            attention + "linear_qkv.layer_norm_weight",
            attention + "in_proj.layer_norm_weight",
        ),
        norm(
            shape,
            f"{HF}{before_mlp}.weight",
            shape.hidden,
            MEGATRON + "pre_mlp_layernorm.weight",
            MEGATRON + "mlp.linear_fc1.layer_norm_weight",
        ),
    )


def attention(shape: ModelShape) -> tuple[Entry, ...]:
    groups, width = shape.kv_heads, shape.head_dim
    query, key = shape.heads * width, groups * width
    hf, megatron = HF + "self_attn.", MEGATRON + "self_attention."

    def merge(tensors: Tensors) -> Tensors:
        """q, k, v -> rows grouped by query group, [q.. k v] each."""
        grouped = [tensor.unflatten(0, (groups, -1)) for tensor in tensors]
        return (torch.cat(grouped, 1).flatten(0, 1),)

    def split(parts: Tensors) -> Tensors:
        rows = parts[0].unflatten(0, (groups, -1)).split([query // groups, width, width], 1)
        return tuple(tensor.flatten(0, 1) for tensor in rows)

    rows = (("q", query), ("k", key), ("v", key))
    weights = tuple(HFTensor(f"{hf}{name}_proj.weight", (size, shape.hidden)) for name, size in rows)
    entries = [
        Entry(weights, (megatron + "linear_qkv.weight",), merge, split, axis=0),
        Entry(
            (HFTensor(hf + "o_proj.weight", (shape.hidden, query)),),
            (megatron + "linear_proj.weight",),
            axis=1,
        ),
    ]
    if shape.qkv_bias:
        biases = tuple(HFTensor(f"{hf}{name}_proj.bias", (size,), init="zeros") for name, size in rows)
        entries.insert(1, Entry(biases, (megatron + "linear_qkv.bias",), merge, split, axis=0))
    if shape.qk_norm:
        entries += [
            norm(shape, f"{hf}{name}_norm.weight", width, f"{megatron}{name}_layernorm.weight")
            for name in ("q", "k")
        ]
    return tuple(entries)


def dense(shape: ModelShape) -> tuple[Entry, ...]:
    first, second = (f"{MEGATRON}mlp.{layer}.weight" for layer in ("linear_fc1", "linear_fc2"))
    return gated(HF + "mlp.", (first,), (second,), shape.hidden, shape.ffn)


def experts(shape: ModelShape) -> tuple[Entry, ...]:
    prefix = MEGATRON + "mlp.experts."
    router = HFTensor(HF + "mlp.gate.weight", (shape.experts, shape.hidden))
    first, second = (
        (f"{prefix}local_experts.{{e}}.{layer}.weight", f"{prefix}{layer}.weight{{e}}")
        for layer in ("linear_fc1", "linear_fc2")
    )
    each = gated(HF + "mlp.experts.{e}.", first, second, shape.hidden, shape.expert_ffn)
    return (Entry((router,), (MEGATRON + "mlp.router.weight",)), *each)


def gated(
    hf: str, first: tuple[str, ...], second: tuple[str, ...], hidden: int, ffn: int
) -> tuple[Entry, Entry]:
    """down(silu(gate x) * up x); Megatron keeps gate and up in one matrix."""
    gate, up = (HFTensor(f"{hf}{name}_proj.weight", (ffn, hidden)) for name in ("gate", "up"))
    down = HFTensor(hf + "down_proj.weight", (hidden, ffn))
    return Entry((gate, up), first, axis=0), Entry((down,), second, axis=1)
