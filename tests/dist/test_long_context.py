"""A response of 32k tokens on a tiny model: nothing holds positions x positions, whatever is recomputed, and
context parallelism changes no number."""

import math

import pytest

from megatron_troll.config import Layout, Model, Optimizer
from tests.dist.harness import RankPool
from tests.dist.long_context_worker import Long, rotations, run_long
from tests.dist.tiny import MOE

TOKENS = 32_768
SIZES = MOE | {
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "hidden_size": 16,
    "max_position_embeddings": 2 * TOKENS,
}
# A mask of one bool per pair of positions of half of the queries would take 512 MiB, scores 2 GiB.
MOST = 400 * 2**20


def run(ranks: RankPool, recompute: str, **layout: int) -> list[Long]:
    model = Model.model_validate(
        {
            "path": "none",
            "dtype": "fp32",
            "layout": Layout(**layout),
            "recompute": recompute,
            "optimizer": Optimizer(distributed=False),
        }
    )
    return ranks.run(run_long, model, SIZES, TOKENS)


def test_32k_tokens_take_memory_in_proportion_to_their_number(ranks1: RankPool, ranks2: RankPool) -> None:
    (alone,) = run(ranks1, "none")
    parts = run(ranks2, "full", cp=2)
    assert alone.positions == TOKENS
    assert alone.loss == pytest.approx(math.log(SIZES["vocab_size"]), rel=0.05)
    assert [part.positions for part in parts] == [TOKENS // 2] * 2
    assert sum(part.loss for part in parts) == pytest.approx(alone.loss, rel=1e-5)
    assert all(part.grad_norm == pytest.approx(alone.grad_norm, rel=1e-4) for part in parts)
    assert max(part.peak for part in (alone, *parts)) < MOST


@pytest.mark.parametrize("cp", [1, 2])
def test_packed_sequences_are_turned_at_once(cp: int, ranks1: RankPool, ranks2: RankPool) -> None:
    """Megatron would turn them one by one, with a copy whose backward goes through all of them."""
    model = Model.model_validate(
        {"path": "none", "dtype": "fp32", "layout": {"cp": cp}, "optimizer": {"distributed": False}}
    )
    ranks = {1: ranks1, 2: ranks2}[cp]
    assert ranks.run(rotations, model, SIZES, 6) == [2 * SIZES["num_hidden_layers"]] * cp
