"""Gradients that are reduced while backward runs (optimizer.overlap_grad_reduce) are those that are reduced
after it, and the head's are on their way before backward reaches the body.

test_layouts.py compares them with plain autograd on more layouts.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as Buckets

from megatron_troll.config import Model
from megatron_troll.mcore import model as mcore
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.weights.load import load
from megatron_troll.weights.source import TensorSource
from tests.dist.harness import RankPool
from tests.dist.layouts_batch import OPTIMIZER, Batch, Weights, make_batch
from tests.dist.layouts_worker import Case, buckets_of, cut, streamed, trainer
from tests.dist.tiny import started

BUCKET = 2000
STEPS = (
    Case("clip", packed=True, token_budget=64, aux=0.0),
    Case("troll-own", packed=False, token_budget=40, aux=0.0),
    Case("troll-old", packed=True, token_budget=1, aux=0.0),
)


@dataclass(frozen=True)
class Steps:
    """What optimizer steps gave: gradient norms, the weights at the end; for each step the bucket groups in
    the order in which their reduction began before anything waited for one, and which has the head."""

    norms: list[float]
    weights: Weights
    begun: list[list[int]]
    head: int
    groups: int


def take_steps(config: Model, batch: Batch) -> Steps:
    with started(config.layout) as groups, buckets_of(BUCKET):
        model = mcore.build(config, shape_of(batch.config), groups)
        policy = trainable(model, config.optimizer, total_steps=len(STEPS))
        norms, begun = [], []
        cuts = [cut(batch, case, groups, config.layout) for case in STEPS]
        load(model, TensorSource(batch.before))
        old = [trainer(policy, case).old_readings(m).readings for case, m in zip(STEPS, cuts)]
        load(model, TensorSource(batch.now))
        policy.optimizer.reload_model_params()
        for case, batches, readings in zip(STEPS, cuts, old):
            with beginnings() as order:
                trainer(policy, case).accumulate(batches, readings, [None] * len(batches))
            begun.append(order)
            norms.append(policy.step())
        chunk: Any = model.chunks[-1]
        head = id(chunk.param_to_bucket_group[model.stages[-1].output_weight])
        return Steps(norms, streamed(model), begun, head, len(chunk.bucket_groups))


@contextmanager
def beginnings() -> Iterator[list[int]]:
    """The bucket groups whose reduction began, until something waits for one."""
    order: list[int] = []
    waiting: list[bool] = []
    begin, finish = Buckets.start_grad_sync, Buckets.finish_grad_sync

    def noted_begin(group: Buckets, *args: Any, **fields: Any) -> None:
        if not waiting:
            order.append(id(group))
        begin(group, *args, **fields)

    def noted_finish(group: Buckets, *args: Any, **fields: Any) -> None:
        waiting.append(True)
        finish(group, *args, **fields)

    with (
        mock.patch.object(Buckets, "start_grad_sync", noted_begin),
        mock.patch.object(Buckets, "finish_grad_sync", noted_finish),
    ):
        yield order


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("kind", ["capped-dense", "tied-dense"])
def test_overlapped_steps_are_the_same_steps(kind: str, distributed: bool, ranks2: RankPool) -> None:
    """A sum over two ranks does not depend on its order, but the distributed optimizer's norm does on the
    buckets: there the weights may differ by its rounding."""
    batch = make_batch(kind)
    after, during = (ranks2.run(take_steps, config(distributed, overlap), batch) for overlap in (False, True))
    for plain, overlapped in zip(after, during):
        rounding = 1e-6 if distributed else 0.0
        assert overlapped.norms == pytest.approx(plain.norms, rel=rounding, abs=0)
        assert overlapped.weights.keys() == plain.weights.keys()
        for name, tensor in plain.weights.items():
            torch.testing.assert_close(overlapped.weights[name], tensor, rtol=rounding, atol=rounding)
        assert plain.begun == [[], [], []]
        check_order(overlapped, tied=kind == "tied-dense")


def check_order(steps: Steps, tied: bool) -> None:
    """Megatron learns in its first step which weights have gradients, and overlaps from the second on. The
    head's bucket is the first, or with a tied embedding the last."""
    first, *others = steps.begun
    assert first == []
    for order in others:
        assert len(set(order)) == len(order) == steps.groups > 3
        assert order.index(steps.head) == (steps.groups - 1 if tied else 0)


def config(distributed: bool, overlap: bool) -> Model:
    optimizer = OPTIMIZER.model_copy(update={"distributed": distributed, "overlap_grad_reduce": overlap})
    return Model(path="none", dtype="fp32", optimizer=optimizer)
