"""Generation by a hybrid: the state of linear attention and of its convolution stands for all that was read.

Prompts of 1 to 11 tokens are padded on the left to one batch, so padding that left a trace would show.
"""

from typing import Any

import numpy as np
import pytest

from megatron_troll.config import Sampling
from tests.dist.generation_worker import VOCAB, Case, Generated, generate_cases
from tests.dist.harness import RankPool
from tests.dist.layout_table import LAYOUTS
from tests.dist.test_generation import assert_same, train_and_generate
from tests.dist.tiny import NEXT, write_reference

WITHOUT_CP = [name for name, (_, sizes) in LAYOUTS.items() if "cp" not in sizes]
PLAIN = Sampling(max_tokens=8)
CASES = {
    "plain": Case(PLAIN),
    "backwards, three at a time": Case(PLAIN, {"max_sequences": 3}, tuple(range(9, -1, -1))),
    "fewer than ranks": Case(PLAIN, order=(3,)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("hybrid")
    write_reference(NEXT | {"vocab_size": VOCAB}, folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(ranks1: RankPool, folder: str) -> Generated:
    return ranks1.run(generate_cases, {}, folder, CASES)[0]


@pytest.mark.parametrize("layout", WITHOUT_CP)
def test_cached_decoding_equals_a_full_forward_and_every_layout_draws_the_same_tokens(
    layout: str, folder: str, alone: Generated, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    expected = {rollout.name: rollout for rollout in alone.rollouts["plain"]}
    results: list[Generated] = request.getfixturevalue(f"ranks{world}").run(
        generate_cases, sizes, folder, CASES
    )
    for name in CASES:
        seen = {read for result in results for read in check_readings(result, name)}
        assert seen == {rollout.name for rollout in results[0].rollouts[name]}
        for result in results:
            assert len(result.rollouts[name]) == len(CASES[name].order)
            for rollout in result.rollouts[name]:
                assert_same(rollout, expected[rollout.name])


def check_readings(result: Generated, case: str) -> set[str]:
    """The log-probs of the tokens that one rank has read again by a full forward; their rollouts' names."""
    rollouts = {rollout.name: rollout for rollout in result.rollouts[case]}
    for name, reading in result.readings[case].items():
        rollout: Any = rollouts[name]
        np.testing.assert_allclose(rollout.logp, reading.logp, rtol=0, atol=1e-5)
        np.testing.assert_allclose(rollout.topk.logp, reading.topk_logp, rtol=0, atol=1e-5)
        assert np.array_equal(rollout.topk.ids, reading.topk_ids)
    return set(result.readings[case])


def test_generation_leaves_training_as_it_was(folder: str, ranks2: RankPool) -> None:
    for differing in ranks2.run(train_and_generate, {"tp": 2, "ep": 2}, folder):
        assert differing == []


def test_bf16_log_probs_are_those_of_a_full_forward_to_its_precision(folder: str, ranks2: RankPool) -> None:
    cases = {"plain": CASES["plain"]}
    for result in ranks2.run(generate_cases, {"tp": 2, "ep": 2}, folder, cases, "bf16"):
        for rollout in result.rollouts["plain"]:
            reading = result.readings["plain"][rollout.name]
            np.testing.assert_allclose(rollout.logp, reading.logp, rtol=0, atol=0.1)
