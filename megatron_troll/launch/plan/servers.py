"""What generation holds: weights and caches on the servers' GPUs. Bytes."""

from dataclasses import dataclass

from megatron_troll.config.tree import Config
from megatron_troll.launch.plan.caches import state_of_sequence, values_of_token
from megatron_troll.mcore.shape import ModelShape

BF16, FP8 = 2, 1
SIZES = (1, 2, 4, 8)
GIB = 2**30


@dataclass(frozen=True)
class Server:
    """One server of `tp` GPUs, on each of them.

    weights      of the model, in bf16
    token_bf16   of keys and values of one token; token_fp8: in FP8
    sequence     recurrent state of one sequence (linear attention), whatever its length
    sequences_bf16, sequences_fp8   as long as they may be, that fit beside the weights
    """

    tp: int
    weights: int
    token_bf16: int
    token_fp8: int
    sequence: int
    sequences_bf16: int
    sequences_fp8: int


def server_share(config: Config) -> float:
    """Of a GPU's memory, for weights and caches; by default about what SGLang takes."""
    return config.serve.memory_fraction or 0.85


def servers_of(shape: ModelShape, parameters: int, longest: int, memory: int) -> list[Server]:
    """Servers of 1 to 8 GPUs, for sequences of `longest` tokens and `memory` bytes a GPU for weights and
    caches. None where the weights do not fit, or where the heads cannot be cut so."""
    found = []
    for tp in SIZES:
        weights = BF16 * parameters // tp
        if shape.heads % tp or weights >= memory:
            continue
        values = values_of_token(shape, shape.layer_types, tp)
        state = state_of_sequence(shape, shape.layer_types, tp, BF16)
        room = memory - weights
        found.append(
            Server(
                tp=tp,
                weights=weights,
                token_bf16=BF16 * values,
                token_fp8=FP8 * values,
                sequence=state,
                sequences_bf16=room // (BF16 * values * longest + state),
                sequences_fp8=room // (FP8 * values * longest + state),
            )
        )
    return found
