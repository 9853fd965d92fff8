"""Two epochs of two steps each on the ranks of a layout: what their forwards read, and readings that are
taken from those of the first epoch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megatron_troll.batching.held import joined
from megatron_troll.config import (
    Config,
    Data,
    Layout,
    Model,
    Models,
    Optimizer,
    RolloutConfig,
    Sampling,
    Train,
)
from megatron_troll.mcore import schedule
from megatron_troll.mcore.head import Frozen
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.observe.phases import Phases
from megatron_troll.training import trainer as policy_trainer
from megatron_troll.training.learner import Learner
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.reference import open_reference
from megatron_troll.training.regroup import regrouped
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.types import HeadRequest, MicroBatch, TopK
from megatron_troll.weights.load import load
from megatron_troll.weights.source import TensorSource
from tests.dist.layouts_batch import TEMPERATURE
from tests.dist.methods_batch import ENGINE_K, Batch
from tests.dist.methods_table import METHODS
from tests.dist.methods_worker import trainer
from tests.dist.tiny import MOE, started

UPDATES, EPOCHS = 4, 2
# Reads two records of its own, and the reference at both.
METHOD = "tike-sparse-own"


@dataclass(frozen=True)
class Forwards:
    """The rollouts of all micro-batches that the policy read without gradient and with it, and that the
    reference read; the updates that were skipped."""

    old: list[int]
    trained: list[int]
    reference: list[int]
    skipped: int


@contextmanager
def opened(sizes: dict[str, int], batch: Batch, frozen: str) -> Iterator[tuple[PolicyTrainer, MicroBatcher]]:
    layout = Layout(**sizes)
    model = Model(path=frozen, dtype="fp32", layout=layout, optimizer=Optimizer(distributed=False))
    config = Config(
        name="epochs",
        models=Models(policy=Model(path="none")),
        data=Data(files=("none",)),
        rollout=RolloutConfig(sampling=Sampling(temperature=TEMPERATURE)),
        objective=METHODS[METHOD].config,
        train=Train(updates=UPDATES, epochs=EPOCHS, token_budget=48),
    )
    with started(layout) as groups:
        built = build(model, shape_of(MOE), groups)
        policy = trainable(built, model.optimizer, total_steps=UPDATES)
        beside = open_reference(model, built, TEMPERATURE, HeadRequest())
        load(built, TensorSource(batch.before))
        policy.optimizer.reload_model_params()
        yield trainer(METHOD, policy, beside), MicroBatcher(config, built, layout, topk=ENGINE_K)


def differences(sizes: dict[str, int], batch: Batch, frozen: str) -> dict[str, float]:
    """The largest differences, by field, between what tokens of the second epoch's micro-batches are said to
    be, by the readings of the first epoch's, and what they are read to be; and how many full rows there are
    of each."""
    with opened(sizes, batch, frozen) as (learner, batcher):
        planned = batcher.updates(batch.rollouts, batch.advantages, step=0)
        first, second = joined(planned[:2]), joined(planned[2:])
        group, reference = learner.trainable.model.groups.dp_cp, learner.reference
        assert reference is not None
        read, kept = learner.old_readings(first).readings, reference.keep(first)
        with mock.patch.object(policy_trainer, "PROBED_POSITIONS", 10**6):
            again = learner.old_readings(second).readings
        if not read:
            return {}
        found: dict[str, float] = {}
        for one, other in zip(regrouped(first, read, second, group), again, strict=True):
            compare(one, other, found)
        for one, other in zip(regrouped(first, kept, second, group), reference.keep(second), strict=True):
            compare(one, other, found)
        probes = [reading.probe.rows for reading in read if reading.probe is not None]
        found["rows before"] = float(sum(map(len, probes)))
        return found


def compare(one: Any, other: Any, found: dict[str, float], name: str = "") -> None:
    """Update the largest differences by field."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape
        # Unused slots hold -inf on both sides.
        gap = (one.double() - other.double()).masked_fill(one == other, 0.0).abs()
        found[name] = max(found.get(name, 0.0), float(gap.max()) if gap.numel() else 0.0)
        return
    fields = one if isinstance(one, dict) else vars(one)
    for field, value in fields.items():
        theirs = other[field] if isinstance(one, dict) else getattr(other, field)
        if field == "probe":
            found["rows"] = found.get("rows", 0.0) + len(value.rows)
            compare(value.logp, theirs.logp[value.rows], found, "probe")
        elif isinstance(value, torch.Tensor | dict | TopK | Frozen):
            compare(value, theirs, found, f"{name}/{field}")


def forwards(sizes: dict[str, int], batch: Batch, frozen: str) -> Forwards:
    """Learn from the batch."""
    seen = Forwards([], [], [], 0)
    with opened(sizes, batch, frozen) as (learner, batcher):
        run, policy = schedule._run, learner.trainable.model

        def watched(model: MegatronModel, batches: list[MicroBatch], loss: Any, forward_only: bool) -> Any:
            into = seen.reference if model is not policy else seen.old if forward_only else seen.trained
            into.extend(i for each in batches for i in each.rollouts)
            return run(model, batches, loss, forward_only)

        with mock.patch.object(schedule, "_run", watched):
            result = Learner(learner, batcher, Phases()).learn(batch.rollouts, batch.advantages, step=0)
        return Forwards(seen.old, seen.trained, seen.reference, result.skipped)
