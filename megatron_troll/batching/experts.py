"""The experts that a rollout recorded, checked against what a model can replay."""

from dataclasses import dataclass

import numpy as np

from megatron_troll.types import Rollout


@dataclass(frozen=True)
class Routing:
    """The routers that replay a record.

    layers        indices of this rank's layers, counted from 0
    model_layers  number of layers of the whole model, which a record holds
    experts, per_token   number of experts in a layer, and of those to which a token is routed
    tp_rank       index of the part of the tokens that this rank's routers see (sequence parallelism)
    """

    layers: tuple[int, ...]
    model_layers: int
    experts: int
    per_token: int
    tp_rank: int

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return expert_dtype(self.experts)


def expert_dtype(experts: int) -> type[np.unsignedinteger]:
    """The smallest dtype that can number `experts` experts and hold `unrecorded`."""
    return np.uint8 if experts < 256 else np.uint16


def unrecorded(experts: int) -> int:
    """The value in place of every expert of a token whose routing is not known: a replay leaves the choice to
    the router."""
    return int(np.iinfo(expert_dtype(experts)).max)


def recorded(rollout: Rollout, routing: Routing) -> np.ndarray:
    """The recorded experts [P + T - 1, layers, k], `unrecorded` at tokens whose routing is not known. Raises
    ValueError naming the sample if there are none."""
    experts = rollout.experts
    if experts is None:
        raise ValueError(
            f"sample {rollout.name}: the engine returned no experts, which train.replay=rollout replays"
        )
    read = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
    wanted = (read, routing.model_layers, routing.per_token)
    if experts.shape != wanted:
        raise ValueError(
            f"sample {rollout.name}: its experts have the shape {experts.shape}; tokens read, layers and "
            f"experts per token are {wanted}"
        )
    known = (experts != unrecorded(routing.experts)).any((1, 2), keepdims=True)[..., 0]
    bad = np.argwhere(known & (~_ascending(experts) | (experts[..., -1] >= routing.experts)))
    if bad.size:
        token, layer = bad[0]
        raise ValueError(
            f"sample {rollout.name}: token {token} went to {experts[token, layer].tolist()} in layer "
            f"{layer}; expected ascending experts below {routing.experts}"
        )
    return experts


def _ascending(experts: np.ndarray) -> np.ndarray:
    """[..., k] -> [...] bool, whether each expert is larger than the one before."""
    return np.all(experts[..., 1:] > experts[..., :-1], axis=-1)
