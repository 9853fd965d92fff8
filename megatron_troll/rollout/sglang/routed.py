"""The experts that a server sent each token to, as the record that rollouts keep."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_troll.batching.experts import expert_dtype
from megatron_troll.rollout.sglang.errors import BadReply, NoExperts


@dataclass(frozen=True)
class Routed:
    """What a record has at each token: `per_token` of `experts`, in each of `layers`."""

    layers: int
    per_token: int
    experts: int


def experts_of(meta: Mapping[str, Any], tokens: int, routed: Routed) -> np.ndarray:
    """The record [tokens, layers, per_token] of a reply's `meta_info`, from base64 of int32, in any order.
    Raises NoExperts, BadReply."""
    sent = meta.get("routed_experts")
    if not isinstance(sent, str):
        raise NoExperts(
            "no routed experts, which train.replay=rollout replays: start the server with "
            "--enable-return-routed-experts (serve.routed_experts=true), or set train.replay to old or none"
        )
    try:
        flat = np.frombuffer(base64.b64decode(sent, validate=True), np.dtype("<i4"))
    except (ValueError, binascii.Error) as error:
        raise BadReply(f"routed_experts cannot be decoded: {error}") from error
    shape = (tokens, routed.layers, routed.per_token)
    if len(flat) != np.prod(shape):
        raise BadReply(f"{len(flat)} routed experts; tokens, layers and experts of a token are {shape}")
    if len(flat) and (flat.min() < 0 or flat.max() >= routed.experts):
        raise BadReply(f"routed experts from {flat.min()} to {flat.max()}; the policy has {routed.experts}")
    return np.sort(flat.reshape(shape), axis=-1).astype(expert_dtype(routed.experts))


def continued(parts: Sequence[np.ndarray]) -> np.ndarray | None:
    """One record from those of an answer's parts, each of which begins at the prompt: of each what the one
    before did not read. None without parts."""
    if not parts:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = np.concatenate([whole, part[len(whole) :]])
    return whole
