"""What the layers of one model chunk keep for backward of one micro-batch, by how much is recomputed."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_troll.launch.plan.saved.attention import full_attention, linear_attention
from megatron_troll.launch.plan.saved.flow import Flow
from megatron_troll.launch.plan.saved.mlp import dense, experts

Recompute = Literal["none", "selective", "full"]
MODES: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Saved:
    """Bytes. kept: from forward to backward of the micro-batch; again: what is then computed again, of one
    layer at a time; experts: of `kept`, what depends on where tokens are routed."""

    kept: int
    again: int
    experts: int

    def __add__(self, other: "Saved") -> "Saved":
        return Saved(self.kept + other.kept, max(self.again, other.again), self.experts + other.experts)


NOTHING = Saved(0, 0, 0)


def of_layers(flow: Flow, layers: Iterable[int], mode: Recompute) -> Saved:
    """`layers` by their numbers in the model."""
    kinds = [flow.shape.layer_types[layer] for layer in layers]
    of_kind = {kind: of_layer(flow, kind, mode) for kind in set(kinds)}
    return sum((of_kind[kind] for kind in kinds), NOTHING)


def of_layer(flow: Flow, kind: str, mode: Recompute) -> Saved:
    whole = full_attention(flow) if kind == "full_attention" else linear_attention(flow)
    mlp = experts(flow) if flow.shape.experts else {"mlp": dense(flow)}
    total, routed = whole + sum(mlp.values()), mlp.get("experts", 0)
    if mode == "full":
        return Saved(flow.hidden(flow.shard), total, 0)
    if mode == "selective" and kind == "full_attention":
        without = full_attention(flow, core=False)
        return Saved(total - whole + without, whole - without, routed)
    return Saved(total, 0, routed)


def final_norm(flow: Flow) -> Saved:
    return Saved(flow.norm(flow.shard, flow.shape.hidden), 0, 0)
