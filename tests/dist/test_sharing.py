"""Samples that share prompts, turns and what tools answered, in groups of one to sixteen, have the loss and
gradients of plain autograd on samples that are read one by one, and the metrics and loads of experts of the
same trainer that shares nothing.

sharing_batch.py has the batch; see test_layouts.py.
"""

from collections import Counter
from dataclasses import replace

import pytest

from megatron_troll.batching.prefixes import shared_prefixes
from tests.dist.harness import RankPool
from tests.dist.layout_table import LAYOUTS
from tests.dist.layouts_batch import Batch
from tests.dist.layouts_checks import check_equal, check_expected
from tests.dist.layouts_reference import Expected, Reference
from tests.dist.layouts_worker import Case, Outcome, run_cases
from tests.dist.sharing_batch import LONGEST_PROMPT, make_sharing_batch
from tests.dist.test_layouts import model

# Whole groups; groups cut by a budget that one prompt exceeds; and between.
BELOW_A_PROMPT = LONGEST_PROMPT - 5
CASES = (
    Case("clip", packed=True, token_budget=4096, aux=1.0, shared=True),
    Case("clip", packed=True, token_budget=BELOW_A_PROMPT, aux=1.0, shared=True),
    Case("troll-old", packed=True, token_budget=64, aux=1.0, shared=True),
)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_sharing_batch()


@pytest.fixture(scope="module")
def expected(batch: Batch) -> list[Expected]:
    reference = Reference(batch, "trainer")
    return [reference.expected(case.objective, case.aux) for case in CASES]


@pytest.fixture(scope="module")
def apart(batch: Batch, ranks1: RankPool) -> list[Outcome]:
    """Of CASES on one rank, without sharing."""
    cases = [replace(case, shared=False) for case in CASES]
    (result,) = ranks1.run(run_cases, model({}), batch, cases)
    return result.outcomes


@pytest.mark.parametrize("layout", ["one-rank", "dp2", "cp2"])
def test_what_is_shared_changes_nothing(
    layout: str,
    batch: Batch,
    expected: list[Expected],
    apart: list[Outcome],
    request: pytest.FixtureRequest,
) -> None:
    world, sizes = LAYOUTS[layout]
    for result in request.getfixturevalue(f"ranks{world}").run(run_cases, model(sizes), batch, CASES):
        check_expected(result, expected)
        check_equal(result, apart)


def test_the_batch_has_whatever_sharing_must_bear(batch: Batch, apart: list[Outcome]) -> None:
    rollouts = batch.rollouts
    assert sorted(Counter(rollout.group for rollout in rollouts).values()) == [1, 2, 7, 16]
    assert max(map(len, shared_prefixes(rollouts))) == 3
    assert any(len(rollout.response_ids) == 0 for rollout in rollouts)
    assert any(len(rollout.response_ids) and not rollout.mask.any() for rollout in rollouts)
    assert any(rollout.finish == "length" and rollout.mask.all() for rollout in rollouts)
    assert max(len(rollout.prompt_ids) for rollout in rollouts) > BELOW_A_PROMPT
    counts = [outcome.micro_batches for outcome in apart]
    assert counts[0] == 1 < counts[2] < counts[1]
