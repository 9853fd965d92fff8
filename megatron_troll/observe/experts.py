"""How evenly the tokens of a step went to the experts of each layer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def expert_metrics(loads: Mapping[int, Tensor]) -> dict[str, float]:
    """Layer -> tokens sent to each expert [E] to the metrics of observe/fields.py; {} without experts."""
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
    """The busiest expert's tokens over the mean; NaN without tokens."""
    return float(load.max() / load.double().mean())


def _entropy(load: Tensor) -> float:
    """Entropy of an expert drawn by load over that of an even draw: 1 is even, 0 a single expert."""
    share = load.double() / load.sum()
    return float(torch.special.entr(share).sum() / math.log(len(load))) if len(load) > 1 else 1.0


def replay_metrics(changed: Mapping[int, int], loads: Mapping[int, Tensor]) -> dict[str, float]:
    """Layer -> choices that replay changed, beside the loads of all choices, as shares."""
    chosen = {layer: int(load.sum()) for layer, load in loads.items()}
    shares = {layer: changed[layer] / max(1, chosen[layer]) for layer in changed}
    return {
        "replay_changed": sum(changed.values()) / max(1, sum(chosen.values())),
        **{f"replay_changed/layer_{layer}": share for layer, share in shares.items()},
    }
