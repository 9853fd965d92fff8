"""Metrics of how evenly the tokens of a step are spread over the experts of each layer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def expert_metrics(loads: Mapping[int, Tensor]) -> dict[str, float]:
    """Convert layer -> tokens of each expert [E] to the metrics of observe/fields.py; {} without experts."""
    peaks = {layer: _peak(load) for layer, load in loads.items()}
    entropies = {layer: _entropy(load) for layer, load in loads.items()}
    if not loads:
        return {}
    return {
        "expert_load_max": max(peaks.values()),
        "expert_entropy": min(entropies.values()),
        **{f"expert_load_max/layer_{layer}": peak for layer, peak in peaks.items()},
        **{f"expert_entropy/layer_{layer}": entropy for layer, entropy in entropies.items()},
    }


def _peak(load: Tensor) -> float:
    """Tokens of the busiest expert divided by the mean; NaN without tokens."""
    return float(load.max() / load.double().mean())


def _entropy(load: Tensor) -> float:
    """Entropy of the load distribution divided by that of an even one: 1 is even, 0 a single expert."""
    share = load.double() / load.sum()
    return float(torch.special.entr(share).sum() / math.log(len(load))) if len(load) > 1 else 1.0


def replay_metrics(
    tallies: Mapping[int, tuple[float, float]], loads: Mapping[int, Tensor], per_token: int
) -> dict[str, float]:
    """Shares of router choices that replay changed, and of tokens that it left out because their routing was
    not recorded, from layer -> (changed choices, tokens left out), the loads and the experts of a token."""
    chosen = {layer: float(load.sum()) for layer, load in loads.items()}
    shares = {layer: changed / max(1, chosen[layer]) for layer, (changed, _) in tallies.items()}
    total = max(1, sum(chosen.values()))
    return {
        "replay_changed": sum(changed for changed, _ in tallies.values()) / total,
        "replay_left_out": sum(left_out for _, left_out in tallies.values()) * per_token / total,
        **{f"replay_changed/layer_{layer}": share for layer, share in shares.items()},
    }
