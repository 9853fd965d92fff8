"""Bytes that the layers of one model chunk keep for backward of one micro-batch, by recompute mode."""

from collections.abc import Iterable
from typing import Literal, get_args

from megatron_troll.launch.plan.saved.attention import full_attention, linear_attention
from megatron_troll.launch.plan.saved.flow import Flow, SavedBytes
from megatron_troll.launch.plan.saved.mlp import before_mlp, dense, experts, of_activation

Recompute = Literal["none", "selective", "full"]
MODES: tuple[Recompute, ...] = get_args(Recompute)


NOTHING = SavedBytes(0, 0, 0)


def of_layers(flow: Flow, layers: Iterable[int], mode: Recompute) -> SavedBytes:
    """Bytes of `layers`, given by their numbers in the model."""
    kinds = [(flow.shape.layer_types[layer], flow.shape.rotates(layer)) for layer in layers]
    of_kind = {kind: of_layer(flow, *kind, mode) for kind in set(kinds)}
    return sum((of_kind[kind] for kind in kinds), NOTHING)


def of_layer(flow: Flow, kind: str, rotates: bool, mode: Recompute) -> SavedBytes:
    mixing = full_attention(flow, rotates) if kind == "full_attention" else linear_attention(flow)
    feeding = experts(flow) if flow.shape.experts else dense(flow)
    whole = mixing + feeding.kept
    if mode == "full":
        return SavedBytes(flow.hidden(flow.shard), whole, 0)
    if mode == "none":
        return SavedBytes(whole, 0, feeding.experts)
    kept = mixing
    if "core_attn" in flow.model.recompute_modules and kind == "full_attention":
        kept = full_attention(flow, rotates, core=False)
    less = without(feeding, flow)
    return SavedBytes(kept + less.kept, max(mixing - kept, feeding.kept - less.kept), less.experts)


def without(feeding: SavedBytes, flow: Flow) -> SavedBytes:
    """Bytes that a feed-forward half still keeps when `recompute_modules` are recomputed."""
    modules = flow.model.recompute_modules
    if "moe" in modules or "mlp" in modules:
        return SavedBytes(before_mlp(flow), 0, 0)
    if "moe_act" not in modules:
        return feeding
    activation = of_activation(flow)
    return SavedBytes(feeding.kept - activation, 0, feeding.experts - activation)


def final_norm(flow: Flow) -> SavedBytes:
    return SavedBytes(flow.norm(flow.shard, flow.shape.hidden), 0, 0)
