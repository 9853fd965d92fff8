"""Bytes of weights and caches on the GPUs of rollout servers."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_troll.config import Config, ConfigError
from megatron_troll.launch.plan.saved.flow import FLOAT
from megatron_troll.launch.sglang_flags import check_kv_cache, check_layers, check_rope, check_sizes
from megatron_troll.mcore.shape import ModelShape

BF16, FP8 = 2, 1
SIZES = (1, 2, 4, 8)
GIB = 2**30


@dataclass(frozen=True)
class ServerShare:
    """Bytes on each GPU of a server of `tp` GPUs.

    weights      the model's weights, in bf16
    token_bf16   keys and values of one token, in bf16; token_fp8: in FP8
    sequence     recurrent state of one sequence (linear attention), independent of its length
    sequences_bf16, sequences_fp8   number of sequences of maximum length that fit in addition to the weights
    """

    tp: int
    weights: int
    token_bf16: int
    token_fp8: int
    sequence: int
    sequences_bf16: int
    sequences_fp8: int


def server_share(config: Config) -> float:
    """The fraction of a GPU's memory for weights and caches; by default about what SGLang uses."""
    return config.serve.memory_fraction or 0.85


def servers_of(shape: ModelShape, parameters: int, longest: int, memory: int) -> list[ServerShare]:
    """Servers of 1 to 8 GPUs, for sequences of `longest` tokens and `memory` bytes per GPU for weights and
    caches. Sizes for which the weights do not fit, or the heads cannot be divided, are left out."""
    found = (server_of(shape, parameters, longest, memory, tp) for tp in SIZES if shape.heads % tp == 0)
    return [server for server in found if server.weights < memory]


def server_of(shape: ModelShape, parameters: int, longest: int, memory: int, tp: int) -> ServerShare:
    weights = BF16 * parameters // tp
    values = values_of_token(shape, shape.layer_types, tp)
    state = state_of_sequence(shape, shape.layer_types, tp, BF16)
    room = max(0, memory - weights)
    return ServerShare(
        tp=tp,
        weights=weights,
        token_bf16=BF16 * values,
        token_fp8=FP8 * values,
        sequence=state,
        sequences_bf16=room // (BF16 * values * longest + state),
        sequences_fp8=room // (FP8 * values * longest + state),
    )


def check_servers(config: Config, world: int, shape: ModelShape, parameters: int, longest: int) -> None:
    """Raises ConfigError if the servers of `serve` could not hold one sequence, or not share the GPUs of
    `world` ranks. Servers that are not the run's own are not checked: they may differ from `serve`."""
    serve = config.serve
    if not config.own_servers:
        return
    check_sizes(serve, shape)
    check_rope(shape)
    check_layers(shape)
    check_kv_cache(config, shape)
    if config.rollout.sglang.colocated and serve.servers * serve.tp > world:
        raise ConfigError(
            f"serve.servers={serve.servers} x serve.tp={serve.tp} = {serve.servers * serve.tp} GPUs, shared "
            f"with {world} ranks (rollout.sglang.colocated): lower one of the two"
        )
    memory = round(server_share(config) * config.launch.device_gib * GIB)
    server = server_of(shape, parameters, longest, memory, serve.tp)
    sequences = server.sequences_bf16 if config.rollout.kv_cache == "auto" else server.sequences_fp8
    if sequences == 0:
        weights, room = f"{server.weights / GIB:.1f} GiB", f"{memory / GIB:.1f} GiB"
        raise ConfigError(
            f"serve.tp={serve.tp}: with {weights} of weights, a sequence of {longest} tokens does not fit "
            f"into the {room} of each GPU that serve.memory_fraction leaves; raise one of the two, or lower "
            "rollout.sampling.max_tokens"
        )


def values_of_token(shape: ModelShape, kinds: Sequence[str], tp: int) -> int:
    """Elements of one token's keys and values, in layers of these kinds on one of `tp` ranks; heads are
    replicated if there are more ranks than heads."""
    heads = max(1, shape.kv_heads // tp)
    return 2 * kinds.count("full_attention") * heads * shape.head_dim


def state_of_sequence(shape: ModelShape, kinds: Sequence[str], tp: int, width: int) -> int:
    """Bytes of one sequence's state, independent of its length: the matrix of each value head in fp32, and
    the past inputs that the convolution needs, with `width` bytes per element."""
    linear = shape.linear
    if linear is None:
        return 0
    matrices = FLOAT * linear.value_heads * linear.key_dim * linear.value_dim
    seen = width * (linear.conv - 1) * (2 * linear.key_width + linear.value_width)
    return kinds.count("linear_attention") * (matrices + seen) // tp
