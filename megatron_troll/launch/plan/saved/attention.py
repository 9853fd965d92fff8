"""Bytes that the two kinds of attention keep for backward, their norm and projections included."""

from megatron_troll.launch.plan.saved.flow import FLOAT, INDEX, Flow
from megatron_troll.mcore.delta_rule import CHUNK


def full_attention(flow: Flow, rotates: bool, *, core: bool = True) -> int:
    """Bytes kept by full attention. `rotates`: the layer rotates queries and keys; without `core`, the core
    attention is recomputed in backward."""
    shape, tp, rows, width = flow.shape, flow.model.layout.tp, flow.tokens, flow.width
    heads, groups = shape.heads // tp, shape.kv_heads // tp
    query, key = heads * shape.head_dim, groups * shape.head_dim
    output = width * rows * query
    total = flow.norm(flow.shard, shape.hidden) + flow.hidden(flow.shard)
    total += _heads(flow, heads, groups) + (_rotation(flow) if rotates else 0)
    # For the local core attention every rank gathers all keys; Transformer Engine's passes them around.
    keys = rows if flow.te or not core else rows * flow.model.layout.cp
    total += width * (rows * query + 2 * keys * key)
    if core:
        total += FLOAT * rows * heads + (0 if flow.te else output + (INDEX + 1) * rows)
    if shape.output_gate:
        total += FLOAT * rows * query + output
    return total + output


def _rotation(flow: Flow) -> int:
    """Bytes of the sines and cosines of queries and keys."""
    return 4 * flow.width * flow.tokens * int(flow.shape.head_dim * flow.shape.rotary_fraction)


def _heads(flow: Flow, heads: int, groups: int) -> int:
    """Bytes of the norms of queries and keys."""
    shape, rows = flow.shape, flow.tokens
    if not shape.qk_norm:
        return 0
    norms = flow.norm(rows * (heads + groups), shape.head_dim)
    # Queries and keys are views of the projection's output, which is kept whole if no fp32 copy is.
    kept_whole = flow.te or flow.width == FLOAT
    rest = groups + (heads if shape.output_gate else 0)
    return norms + (flow.width * rows * rest * shape.head_dim if kept_whole else 0)


def linear_attention(flow: Flow) -> int:
    """Bytes kept by Gated DeltaNet, in which a context-parallel rank holds all positions of some heads."""
    linear, layout, width = flow.shape.linear, flow.model.layout, flow.width
    assert linear is not None
    rows, hidden = flow.tokens, flow.norm(flow.shard, flow.shape.hidden) + flow.hidden(flow.shard)
    key_heads, value_heads = linear.key_heads // layout.tp, linear.value_heads // layout.tp
    keys, values = key_heads * linear.key_dim, value_heads * linear.value_dim
    channels = 2 * keys + values
    mixing = 2 * width * channels  # before and after the convolution's activation
    mixing += 2 * FLOAT * (keys + key_heads) + 3 * FLOAT * value_heads  # unit vectors, decay and rate
    rule = _kernels(flow, key_heads, value_heads) if flow.te else _torch_rule(flow, key_heads, value_heads)
    gate = (2 * FLOAT + width) * values + width * values
    return hidden + rows * (mixing + rule + gate) + flow.norm(rows * value_heads, linear.value_dim)


def _torch_rule(flow: Flow, key_heads: int, value_heads: int) -> int:
    """Bytes per position in fp32: the matrices of its chunk (delta_rule.py), the states between chunks."""
    linear = flow.shape.linear
    assert linear is not None
    matrices = CHUNK * (4 * value_heads + key_heads)
    vectors = (7 * value_heads + 2 * key_heads) * linear.key_dim + 3 * value_heads * linear.value_dim
    state = value_heads * linear.key_dim * linear.value_dim / CHUNK
    return round(FLOAT * (matrices + vectors + 4 * value_heads + state))


def _kernels(flow: Flow, key_heads: int, value_heads: int) -> int:
    """Bytes per position with flash-linear-attention: queries, keys and values; for each value head, decay
    and rate in fp32 and one row of the chunk's matrix."""
    linear = flow.shape.linear
    assert linear is not None
    vectors = 2 * key_heads * linear.key_dim + value_heads * linear.value_dim
    return flow.width * (vectors + CHUNK * value_heads) + 2 * FLOAT * value_heads
