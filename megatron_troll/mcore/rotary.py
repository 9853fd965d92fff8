"""Frequencies of the rotary position embedding, equal to those of transformers."""

import math

import torch
from torch import Tensor

from megatron_troll.mcore.shape import Linear, Llama3, ModelShape, Yarn


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Radians per position of each pair of rotated dimensions [pairs], float32 on CPU."""
    width = int(shape.head_dim * shape.rotary_fraction)
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    inverse = shape.rope_theta**exponents
    match shape.rope_scaling:
        case None:
            return 1.0 / inverse
        case Linear(factor):
            return 1.0 / inverse / factor
        case Llama3() as llama3:
            return _llama3(1.0 / inverse, llama3)
        case Yarn() as yarn:
            return _yarn(inverse, yarn, shape.rope_theta)


def attention_factor(shape: ModelShape) -> float:
    """Scale of sines and cosines."""
    return shape.rope_scaling.scale if isinstance(shape.rope_scaling, Yarn) else 1.0


# The order of operations is that of transformers, so that no bit differs.


def _llama3(plain: Tensor, scaling: Llama3) -> Tensor:
    turns = scaling.original_positions / (2 * math.pi / plain)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(inverse: Tensor, yarn: Yarn, theta: float) -> Tensor:
    pairs = len(inverse)

    def pair_that_turns(times: float) -> float:
        """The pair, as a real number, that turns so many times in the original positions."""
        return pairs * math.log(yarn.original_positions / (times * 2 * math.pi)) / math.log(theta)

    first, last = pair_that_turns(yarn.beta_fast), pair_that_turns(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    # transformers limits the last pair by the number of dimensions.
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    ramp = (torch.arange(pairs, dtype=torch.float32, device="cpu") - first) / (last - first)
    kept = 1 - ramp.clamp(0, 1)
    return 1.0 / (yarn.factor * inverse) * (1 - kept) + 1.0 / inverse * kept
