"""Logits that are NaN or infinite: whatever reads the head, the samples at fault are named, and no others."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from megatron_troll.config import Layout, Model
from megatron_troll.mcore import model as mcore
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.types import Rollout
from megatron_troll.weights.load import load
from megatron_troll.weights.source import TensorSource
from tests.dist.harness import RankPool
from tests.dist.layouts_batch import OPTIMIZER, Batch, Weights, make_batch
from tests.dist.layouts_worker import Case, cut, trainer
from tests.dist.tiny import started

OBJECTIVES = ("clip", "troll-own", "troll-old")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CULPRIT = 3


@dataclass(frozen=True)
class Named:
    """The rollouts at fault: before the update, and in it where the weights went wrong only then; whether the
    gradients of the update were found healthy."""

    before: tuple[int, ...]
    during: tuple[int, ...]
    healthy: bool


def name_faults(layout: Layout, batch: Batch, wrong: Weights) -> dict[str, Named]:
    config = Model(path="none", dtype="fp32", layout=layout, optimizer=OPTIMIZER)
    with started(layout) as groups:
        model = mcore.build(config, shape_of(batch.config), groups)
        policy, named = trainable(model, OPTIMIZER, total_steps=1), {}
        for objective in OBJECTIVES:
            # Padded: attention weighs every sequence of a packed row, be it by 0, and 0 x NaN is NaN.
            case = Case(objective, packed=False, token_budget=64, aux=0.0)
            batches, learner = cut(batch, case, groups, layout), trainer(policy, case)
            load(model, TensorSource(wrong))
            before = learner.old_readings(batches).broken
            load(model, TensorSource(batch.now))
            old = learner.old_readings(batches)
            assert old.broken == ()
            load(model, TensorSource(wrong))
            result = learner.accumulate(batches, old.readings, [None] * len(batches))
            healthy = policy.finite(result.loss)
            named[objective] = Named(before, learner.agree_on(result.broken), healthy)
        return named


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch("capped-dense")


@pytest.fixture(params=[Layout(), Layout(tp=2), Layout(pp=2)], ids=["one-rank", "tp2", "pp2"])
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


def ranks_of(layout: Layout, request: pytest.FixtureRequest) -> RankPool:
    return request.getfixturevalue(f"ranks{layout.tp * layout.pp}")


def test_nan_logits_name_their_sample(layout: Layout, batch: Batch, request: pytest.FixtureRequest) -> None:
    """The embedding of a token that one sample alone has is NaN."""
    wrong = with_row(batch.now, EMBEDDING, token_of(CULPRIT, batch.rollouts), float("nan"))
    for named in ranks_of(layout, request).run(name_faults, layout, batch, wrong):
        assert set(named.values()) == {Named((CULPRIT,), (CULPRIT,), healthy=False)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_row_of_the_head_names_every_sample_that_reads_it(
    value: float, layout: Layout, batch: Batch, request: pytest.FixtureRequest
) -> None:
    """The token of the row is sampled once; `support: old` forms its logit alone, the others whole rows."""
    token = token_of(CULPRIT, batch.rollouts)
    wrong = with_row(batch.now, HEAD, token, value)
    every = tuple(i for i, rollout in enumerate(batch.rollouts) if rollout.mask.any())
    for named in ranks_of(layout, request).run(name_faults, layout, batch, wrong):
        assert all(each.before == every for each in named.values()), named
        assert named["clip"].during == every
        assert not any(each.healthy for each in named.values()), named


def token_of(culprit: int, rollouts: Sequence[Rollout]) -> int:
    """A token that the sample `culprit` has, before its last, and no other."""
    others = {int(t) for i, r in enumerate(rollouts) for t in read_by(r) if i != culprit}
    return next(int(t) for t in rollouts[culprit].response_ids[:-1] if int(t) not in others)


def read_by(rollout: Rollout) -> list[int]:
    return [*rollout.prompt_ids, *rollout.response_ids]


def with_row(weights: Weights, name: str, row: int, value: float) -> Weights:
    tensor = weights[name].clone()
    tensor[row] = torch.full_like(tensor[row], value)
    return {**weights, name: tensor}
