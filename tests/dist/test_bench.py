"""What the benchmarks time against each other computes the same thing."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from bench_head import SMALL, check, variants
from bench_step import Bench, Shape, step
from bench_step import variants as step_variants

from megatron_troll.config import Layout
from megatron_troll.mcore import parallel
from tests.dist.harness import RankPool
from tests.dist.tiny import started

TINY = Shape(hidden=32, vocab=512, answers=8, updates=2, token_budget=1024, dtype="fp32", k=16)


def check_heads() -> list[str | None]:
    with started(Layout()):
        check("cpu")
        return [variant.missing("cpu", SMALL.dtype) for variant in variants(SMALL.k)]


def test_every_way_to_the_loss_has_the_gradients_of_float64(ranks1: RankPool) -> None:
    """Whatever runs here: of the baselines, all but two."""
    (missing,) = ranks1.run(check_heads)
    assert [reason for reason in missing if reason is not None] == [
        "rounds its gradient to bf16",
        "a Triton kernel: needs a GPU",
    ]


def take_steps() -> dict[str, dict[str, float]]:
    with taken_down():
        bench = Bench.of(TINY)
        learners = {v.name: bench.learner(v) for v in step_variants(bench.policy, TINY.k)}
        return {name: step(bench, learner) for name, learner in learners.items()}


@contextmanager
def taken_down() -> Iterator[None]:
    from megatron.core import parallel_state

    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel._formed.clear()


def test_whole_steps_of_one_objective_are_the_same(ranks1: RankPool) -> None:
    (metrics,) = ranks1.run(take_steps)
    for names in (
        ("clip/materialised", "clip/fused", "clip/fused_unchunked"),
        ("troll/materialised", "troll/support_own", "troll/support_own_unchunked"),
        ("troll/support_old", "troll/support_old_unchunked"),
    ):
        for name in names[1:]:
            for key in ("loss", "grad_norm"):
                assert metrics[name][key] == pytest.approx(metrics[names[0]][key], rel=1e-4), (name, key)
    assert metrics["troll/support_own"]["projected"] > 0.4
    assert metrics["troll/support_old"]["projected"] > 0.4
