"""Experts that a forward repeats: on every layout the loss and gradients of plain autograd on Hugging Face's
model with its routers' choices replaced.

layouts_worker.py has what ranks run, layouts_reference.py the plain autograd, replay_worker.py the rollouts
of the in-process engine.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_troll.types import Rollout
from tests.dist.generation_worker import CONFIG
from tests.dist.harness import RankPool
from tests.dist.layout_table import LAYOUTS
from tests.dist.layouts_batch import OPTIMIZER, Batch, make_batch
from tests.dist.layouts_checks import check_expected
from tests.dist.layouts_reference import UNRECORDED, Expected, Reference, Replay
from tests.dist.layouts_worker import Case, run_cases
from tests.dist.replay_worker import Choices, draw_and_replay
from tests.dist.test_layouts import model
from tests.dist.tiny import MOE, write_reference

EXPERTS, CHOSEN, LAYERS = MOE["num_experts"], MOE["num_experts_per_tok"], MOE["num_hidden_layers"]
CASES = (
    Case("clip", packed=True, token_budget=64, aux=1.0, replay="rollout"),
    Case("clip", packed=False, token_budget=96, aux=0.0, replay="old"),
    Case("troll-own", packed=False, token_budget=40, aux=1.0, replay="rollout"),
    Case("troll-own", packed=True, token_budget=1, aux=1.0, replay="old"),
    Case("clip", packed=True, token_budget=64, aux=1.0, replay="old", shared=True),
)
RECOMPUTED_EXPERTS = {"recompute": "selective", "recompute_modules": ("core_attn", "moe")}
LAYOUTS_RUN: dict[str, dict[str, Any]] = {
    "one-rank": {},
    "tp2-ep2": {"recompute": "full"},
    "pp2-interleaved": RECOMPUTED_EXPERTS,
    "tp2-pp2-ep2": {"recompute": "full"},
    "tp2-cp2-ep2-etp2": {"optimizer": OPTIMIZER.model_copy(update={"distributed": True})},
}


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Whose engine chose experts at random, which no router does."""
    whole, generator = make_batch("moe"), np.random.default_rng(11)
    return replace(whole, rollouts=[with_experts(rollout, generator) for rollout in whole.rollouts])


def with_experts(rollout: Rollout, generator: np.random.Generator) -> Rollout:
    tokens = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
    order = generator.random((tokens, LAYERS, EXPERTS)).argsort(-1)[..., :CHOSEN]
    experts = np.sort(order, -1).astype(np.uint8)
    # A token whose routing is not known.
    experts[len(rollout.prompt_ids) - 1] = UNRECORDED
    return replace(rollout, experts=experts)


@pytest.fixture(scope="module")
def references(batch: Batch) -> dict[Replay, Reference]:
    return {replay: Reference(batch, "trainer", replay) for replay in ("old", "rollout")}


@pytest.fixture(scope="module")
def expected(references: dict[Replay, Reference]) -> list[Expected]:
    return [references[case.replay].expected(case.objective, case.aux) for case in CASES]


@pytest.mark.parametrize("layout", LAYOUTS_RUN)
def test_layout_gives_the_loss_and_gradients_of_plain_autograd(
    layout: str,
    batch: Batch,
    references: dict[Replay, Reference],
    expected: list[Expected],
    request: pytest.FixtureRequest,
) -> None:
    world, sizes = LAYOUTS[layout]
    pool = request.getfixturevalue(f"ranks{world}")
    for result in pool.run(run_cases, model(sizes, **LAYOUTS_RUN[layout]), batch, CASES):
        check_expected(result, expected)
        for case, outcome in zip(CASES, result.outcomes):
            changed = changes(references[case.replay])
            assert outcome.metrics["replay_changed"] == pytest.approx(float(changed.mean()))
            for layer, share in enumerate(changed.tolist()):
                assert outcome.metrics[f"replay_changed/layer_{layer}"] == pytest.approx(share)
            left_out = len(batch.rollouts) / len(references["rollout"].now.experts)
            wanted = left_out if case.replay == "rollout" else 0.0
            assert outcome.metrics["replay_left_out"] == pytest.approx(wanted)


def changes(reference: Reference) -> torch.Tensor:
    """[layers] share of the replayed choices that the routers, as they are now, would not have made; tokens
    of a prompt that responses share count once."""
    own = torch.stack([logits.topk(CHOSEN, 1).indices for logits in reference.now.routing], 1)
    given = reference.now.experts
    changed = (given[..., :, None] != own[..., None, :]).all(-1).double().mean(2)
    return reference.share @ changed / reference.share.sum()


def test_replay_changes_choices(references: dict[Replay, Reference]) -> None:
    assert 0.005 < changes(references["old"]).mean() < 0.5
    assert changes(references["rollout"]).mean() > 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_reference(CONFIG, folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(ranks1: RankPool, folder: str) -> Choices:
    return ranks1.run(draw_and_replay, {}, folder)[0]


def test_the_engine_records_the_experts_of_every_token_that_it_read(alone: Choices) -> None:
    lengths = {len(rollout.response_ids) for rollout in alone.rollouts}
    assert len(lengths) > 1
    for rollout in alone.rollouts:
        assert rollout.experts is not None
        read = len(rollout.prompt_ids) + len(rollout.response_ids) - 1
        assert rollout.experts.shape == (read, LAYERS, CHOSEN)
        assert rollout.experts.dtype == np.uint8


@pytest.mark.parametrize("layout", ["one-rank", "tp2-ep2", "pp2-interleaved", "tp2-ep2-dp2"])
def test_recorded_experts_are_those_of_a_full_forward_and_replay_keeps_them(
    layout: str, alone: Choices, folder: str, request: pytest.FixtureRequest
) -> None:
    """Routers are steep enough that rounding changes no choice."""
    world, sizes = LAYOUTS[layout]
    for choices in request.getfixturevalue(f"ranks{world}").run(draw_and_replay, sizes, folder):
        for rollout, expected in zip(choices.rollouts, alone.rollouts, strict=True):
            assert rollout.response_ids.tolist() == expected.response_ids.tolist()
            np.testing.assert_array_equal(rollout.experts, expected.experts)
        assert choices.unchanged == 1
        assert 0.1 < choices.moved < 0.9
        assert choices.replayed == 1
