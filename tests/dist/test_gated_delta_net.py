"""Layers of linear attention on flash-linear-attention's kernels, of which CI has a stand-in in plain torch.

test_layouts.py has the same layers on the exact rule."""

import pytest

from megatron_troll.config import Layout, Model
from tests.dist.delta_rule_worker import built_beside, run_in_kernels
from tests.dist.harness import RankPool
from tests.dist.layout_table import Sizes
from tests.dist.layouts_batch import OPTIMIZER, Batch, make_batch
from tests.dist.layouts_checks import check_expected
from tests.dist.layouts_reference import Reference
from tests.dist.layouts_worker import Case

CASES = (
    Case("clip", packed=True, token_budget=64, aux=0.0),
    Case("troll-own", packed=False, token_budget=4096, aux=1.0),
    Case("troll-old", packed=True, token_budget=4096, aux=0.0),
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch("hybrid")


@pytest.fixture(scope="module")
def reference(batch: Batch) -> Reference:
    return Reference(batch, "trainer")


@pytest.mark.parametrize(
    ("sizes", "recompute"),
    [({}, "none"), ({"cp": 2}, "none"), ({"tp": 2}, "selective")],
    ids=["one-rank", "cp2", "tp2-recomputed"],
)
def test_kernels_are_given_packed_sequences_end_to_end(
    sizes: Sizes, recompute: str, batch: Batch, reference: Reference, request: pytest.FixtureRequest
) -> None:
    config = Model.model_validate(
        {"path": "none", "dtype": "fp32", "layout": Layout(**sizes), "recompute": recompute}
        | {"optimizer": OPTIMIZER}
    )
    pool: RankPool = request.getfixturevalue("ranks2" if sizes else "ranks1")
    results = pool.run(run_in_kernels, config, batch, CASES)
    expected = [reference.expected(case.objective, case.aux) for case in CASES]
    lengths = {len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in batch.rollouts}
    for result, seen in results:
        check_expected(result, expected)
        assert seen
        assert min(seen) > 0
        assert sizes or set(seen) == lengths  # nothing is padded but for the layout's sake


def test_too_old_a_release_is_refused_when_the_layer_is_built(ranks1: RankPool) -> None:
    """0.4.2 has no value heads of its own: it leaves half of the output of Qwen3-Next uninitialised."""
    (said,) = ranks1.run(built_beside, "0.4.2", Model(path="none", dtype="bf16"))
    assert "flash-linear-attention 0.4.2 is installed" in said
    assert "pip install 'flash-linear-attention>=0.6'" in said
