"""Random numbers of tokens, each a function of a 64-bit key and the token's position: nothing is stored."""

from collections.abc import Sequence

import numpy as np

GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def uniforms(keys: Sequence[int], position: int | Sequence[int] | np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) per key for token `position` of its answer, one for all or one each: the 53 high
    bits of output `position` of SplitMix64 (Steele, Lea, Flood 2014), seeded with the key."""
    with np.errstate(over="ignore"):
        steps = np.asarray(position, dtype=np.uint64) + np.uint64(1)
        z = np.asarray(keys, dtype=np.uint64) + steps * GOLDEN_GAMMA
        z = (z ^ (z >> np.uint64(30))) * np.uint64(FACTORS[0])
        z = (z ^ (z >> np.uint64(27))) * np.uint64(FACTORS[1])
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53


def token_uniforms(key: int, length: int) -> np.ndarray:
    """[length] float64 in [0, 1), one per token of the sample of this key."""
    return uniforms([key], np.arange(length))


def key_of(numbers: np.ndarray) -> int:
    """A key of which `numbers` [T] are the `token_uniforms`, for files that hold numbers in place of keys:
    each step of SplitMix64 can be undone, and the later numbers choose among the 2^11 keys of the first.
    Raises ValueError if there is none."""
    if not len(numbers):
        return 0
    high = (numbers[:1] * 2.0**53).astype(np.uint64) << np.uint64(11)
    z = high | np.arange(1 << 11, dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = _unshifted(z, 31) * np.uint64(pow(FACTORS[1], -1, 1 << 64))
        z = _unshifted(z, 27) * np.uint64(pow(FACTORS[0], -1, 1 << 64))
        keys = _unshifted(z, 30) - GOLDEN_GAMMA
    for position in range(1, min(3, len(numbers))):
        keys = keys[uniforms(keys.tolist(), position) == numbers[position]]
    for key in keys[:1].tolist():
        if np.array_equal(token_uniforms(key, len(numbers)), numbers):
            return key
    raise ValueError("its random numbers are not those of any key")


def _unshifted(z: np.ndarray, bits: int) -> np.ndarray:
    """The x of which z = x ^ (x >> bits), `bits` being at least a third of 64."""
    return z ^ (z >> np.uint64(bits)) ^ (z >> np.uint64(2 * bits))
