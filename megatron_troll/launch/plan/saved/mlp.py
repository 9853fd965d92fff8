"""Bytes that the feed-forward half of a layer keeps for backward, its norm included."""

from megatron_troll.launch.plan.saved.flow import FLOAT, INDEX, Flow, SavedBytes

# Tensors of a gated MLP: gate and up (stored as one), silu(gate), up + 0, and the second matrix's input.
GATED = 5
# Without a gate: the activation's input and output.
UNGATED = 2


def before_mlp(flow: Flow) -> int:
    """Bytes of the norm and of its output."""
    return flow.norm(flow.shard, flow.shape.hidden) + flow.hidden(flow.shard)


def dense(flow: Flow) -> SavedBytes:
    tensors = GATED if flow.shape.gated else UNGATED
    inside = tensors * flow.width * flow.tokens * flow.shape.ffn // flow.model.layout.tp
    return SavedBytes(before_mlp(flow) + inside, 0, 0)


def experts(flow: Flow) -> SavedBytes:
    chosen = (INDEX + FLOAT) * flow.routed
    routed = _routed(flow)
    return SavedBytes(before_mlp(flow) + chosen + _dispatch(flow) + _shared(flow) + routed, 0, routed)


def of_activation(flow: Flow) -> int:
    """Bytes of the experts, without the input and output of their first matrix."""
    return (GATED - 1) * flow.width * flow.received * flow.shape.expert_ffn // flow.model.layout.etp


def _dispatch(flow: Flow) -> int:
    """Bytes of the routing: the experts of each token, and their weights."""
    rows = flow.shard
    if flow.model.moe.dispatcher == "allgather":
        rows *= flow.model.layout.ep * flow.model.layout.etp
    return (1 + FLOAT) * rows * flow.shape.experts + INDEX * flow.routed


def _routed(flow: Flow) -> int:
    """Bytes of the routed experts: the tensors of GATED, and the product with the router's weight."""
    ffn = flow.shape.expert_ffn // flow.model.layout.etp
    return flow.received * (flow.width * (flow.shape.hidden + (GATED + 1) * ffn) + FLOAT)


def _shared(flow: Flow) -> int:
    shape = flow.shape
    if not shape.shared_expert_ffn:
        return 0
    inside = GATED * flow.width * flow.tokens * shape.shared_expert_ffn // flow.model.layout.tp
    return inside + flow.hidden(flow.shard) + flow.width * flow.shard
