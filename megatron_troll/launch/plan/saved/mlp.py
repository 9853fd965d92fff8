"""What the feed-forward half of a layer keeps for backward, its norm included. Bytes."""

from megatron_troll.launch.plan.saved.flow import FLOAT, INDEX, Flow

# Of a gated MLP: gate and up (one tensor), silu(gate), up + 0, and what the second matrix reads.
GATED = 5


def dense(flow: Flow) -> int:
    shape, layout = flow.shape, flow.model.layout
    inside = GATED * flow.width * flow.tokens * shape.ffn // layout.tp
    return flow.norm(flow.shard, shape.hidden) + flow.hidden(flow.shard) + inside


def experts(flow: Flow) -> dict[str, int]:
    """`router`: what does not depend on where tokens go; `experts`: what does."""
    shape = flow.shape
    router = flow.norm(flow.shard, shape.hidden) + flow.hidden(flow.shard)
    router += (INDEX + FLOAT) * flow.routed
    return {"router": router + _dispatch(flow) + _shared(flow), "experts": _routed(flow)}


def _dispatch(flow: Flow) -> int:
    """Which tokens go where, and with what weight."""
    rows = flow.shard
    if flow.model.moe.dispatcher == "allgather":
        rows *= flow.model.layout.ep * flow.model.layout.etp
    return (1 + FLOAT) * rows * flow.shape.experts + INDEX * flow.routed


def _routed(flow: Flow) -> int:
    """As GATED, and the product with the router's weight."""
    ffn = flow.shape.expert_ffn // flow.model.layout.etp
    return flow.received * (flow.width * (flow.shape.hidden + (GATED + 1) * ffn) + FLOAT)


def _shared(flow: Flow) -> int:
    shape = flow.shape
    if not shape.shared_expert_ffn:
        return 0
    inside = GATED * flow.width * flow.tokens * shape.shared_expert_ffn // flow.model.layout.tp
    return inside + flow.hidden(flow.shard) + flow.width * flow.shard
