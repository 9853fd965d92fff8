"""What generation keeps of a sequence: keys and values of its tokens, and states of linear attention."""

from collections.abc import Sequence

from megatron_troll.launch.plan.saved.flow import FLOAT
from megatron_troll.mcore.shape import ModelShape


def values_of_token(shape: ModelShape, kinds: Sequence[str], tp: int) -> int:
    """Keys and values, in numbers, of layers of these kinds on one of `tp` ranks; a head of them is copied
    where there are more ranks than heads."""
    heads = max(1, shape.kv_heads // tp)
    return 2 * kinds.count("full_attention") * heads * shape.head_dim


def state_of_sequence(shape: ModelShape, kinds: Sequence[str], tp: int, width: int) -> int:
    """Bytes, whatever its length: the matrix of each value head in fp32, and what the convolution must see
    again, `width` bytes a number."""
    linear = shape.linear
    if linear is None:
        return 0
    matrices = FLOAT * linear.value_heads * linear.key_dim * linear.value_dim
    seen = width * (linear.conv - 1) * (2 * linear.key_width + linear.value_width)
    return kinds.count("linear_attention") * (matrices + seen) // tp
