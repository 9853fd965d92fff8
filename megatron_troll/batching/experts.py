"""The experts that a rollout recorded, held to what a model can replay."""

from dataclasses import dataclass

import numpy as np

from megatron_troll.types import Rollout


@dataclass(frozen=True)
class Routing:
    """The routers that replay a record.

    layers        those of this rank, counted from 0
    model_layers  of the whole model: what a record holds
    experts, per_token   there are in a layer, and that a token goes to
    tp_rank       under sequence parallelism a router meets this part of the tokens
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
    """The smallest that numbers so many."""
    return np.uint8 if experts <= 256 else np.uint16


def recorded(rollout: Rollout, routing: Routing) -> np.ndarray:
    """[P + T - 1, layers, k]. Raises ValueError naming the sample where there is no such record."""
    experts = rollout.experts
    if experts is None:
        raise ValueError(
            f"sample {rollout.name}: the engine returned no experts, which train.replay=rollout replays"
        )
    read = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
    wanted = (read, routing.model_layers, routing.per_token)
    if experts.shape != wanted:
        raise ValueError(
            f"sample {rollout.name}: its experts are of the shape {experts.shape}; tokens read, layers and "
            f"experts of a token are {wanted}"
        )
    bad = np.argwhere(~_ascending(experts) | (experts[..., -1] >= routing.experts))
    if bad.size:
        token, layer = bad[0]
        raise ValueError(
            f"sample {rollout.name}: token {token} went to {experts[token, layer].tolist()} in layer "
            f"{layer}; expected ascending experts below {routing.experts}"
        )
    return experts


def _ascending(experts: np.ndarray) -> np.ndarray:
    """[...], of [..., k]: whether each is larger than the one before."""
    return np.all(experts[..., 1:] > experts[..., :-1], axis=-1)
