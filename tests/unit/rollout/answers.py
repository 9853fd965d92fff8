"""Random answers of an engine, for tests."""

import numpy as np

from megatron_troll.rollout.engine import Completion
from megatron_troll.types import TokenTopK

PROMPT, K = 3, 4


def answer(length: int, k: int = K) -> Completion:
    rng = np.random.default_rng([length, k])
    ids = rng.integers(0, 50, (length, k)).astype(np.int32)
    return Completion(
        ids=rng.integers(0, 50, length).astype(np.int32),
        logp=np.where(rng.random(length) < 0.2, -np.inf, rng.standard_normal(length)).astype(np.float32),
        topk=TokenTopK(ids, rng.standard_normal((length, k)).astype(np.float32)),
        versions=rng.integers(0, 9, length).astype(np.int32),
        finish="stop" if length % 2 else "length",
        experts=rng.integers(0, 200, (max(0, PROMPT + length - 1), 2, 3)).astype(np.uint8),
    )


def assert_arrays(one: np.ndarray, other: np.ndarray) -> None:
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)
