"""A rollout model on the ranks of a layout, beside the policy that teaches it."""

from dataclasses import dataclass
from typing import Any
from unittest import mock

from megatron_troll.advantages.grpo import Grpo
from megatron_troll.config import (
    Config,
    Distill,
    Layout,
    Model,
    Models,
    Optimizer,
    RolloutConfig,
    Sampling,
    Train,
)
from megatron_troll.config import RolloutModelConfig as RolloutModelConfig
from megatron_troll.mcore import parallel, schedule
from megatron_troll.mcore.checkpoint import Checkpoints
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.observe.phases import Phases
from megatron_troll.parallel.groups import Groups
from megatron_troll.training.rollout_model import RolloutModel, assembled
from megatron_troll.types import MicroBatch
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.placement import held_parameters, shard_group
from megatron_troll.weights.source import TensorSource
from tests.dist.layouts_batch import TEMPERATURE, Batch, Weights
from tests.dist.parameters import main_gradient
from tests.dist.tiny import started

CLIPPED_NEVER = 1e9
KEPT, WEIGHT = 5, 1.7


@dataclass(frozen=True)
class Pupil:
    """A rollout model: its Hugging Face config and weights."""

    config: dict[str, Any]
    weights: Weights


@dataclass(frozen=True)
class Cut:
    """The layouts of policy and rollout model, and the size of micro-batches."""

    policy: dict[str, int]
    pupil: dict[str, int]
    token_budget: int
    packed: bool = True
    epochs: int = 1


@dataclass(frozen=True)
class Seen:
    """What learning reports, the weight of the next batch, and this rank's gradients: names of the Hugging
    Face tensors, the shard's number, the gradient."""

    metrics: dict[str, float]
    weight: float
    gradients: list[tuple[tuple[str, ...], int, Any]]


def learn(cut: Cut, batch: Batch, pupil: Pupil) -> Seen:
    """One update, taught by a policy with the weights `now`."""
    with started(Layout(**cut.policy)) as groups:
        model = opened(cut, batch, pupil, groups, distributed=False)
        taught = model.learn(batch.rollouts, batch.advantages, 0, None)
        return Seen(taught.metrics, taught.weight, list(shards(model.model, pupil)))


def taught(cut: Cut, batch: Batch, pupil: Pupil) -> list[int]:
    """The rollouts of all micro-batches that the policy reads."""
    with started(Layout(**cut.policy)) as groups:
        model, run, found = opened(cut, batch, pupil, groups, distributed=False), schedule._run, list[int]()

        def watched(read: MegatronModel, batches: list[MicroBatch], loss: Any, forward_only: bool) -> Any:
            if read is model.teacher.model:
                found.extend(i for each in batches for i in each.rollouts)
            return run(read, batches, loss, forward_only)

        with mock.patch.object(schedule, "_run", watched):
            assert (
                model.learn(batch.rollouts, batch.advantages, 0, None).metrics["rollout_model_skipped"] == 0
            )
        return found


def opened(cut: Cut, batch: Batch, pupil: Pupil, groups: Groups, *, distributed: bool) -> RolloutModel:
    layout, own = Layout(**cut.policy), Layout(**cut.pupil)
    optimizer = Optimizer(lr=1e-3, grad_norm=CLIPPED_NEVER, distributed=distributed)
    distill = Distill(k=KEPT, weight=WEIGHT, target_kl=0.01, gain=0.2)
    config = Config(
        name="pupil",
        models=Models(
            policy=Model(path="none", dtype="fp32", layout=layout),
            rollout=RolloutModelConfig(
                path="none", dtype="fp32", layout=own, optimizer=optimizer, distill=distill
            ),
        ),
        rollout=RolloutConfig(sampling=Sampling(temperature=TEMPERATURE)),
        train=Train(updates=cut.epochs, epochs=cut.epochs, packing=cut.packed, token_budget=cut.token_budget),
    )
    policy = build(config.policy, shape_of(batch.config), groups, trained=False)
    load(policy, TensorSource(batch.now))
    model = config.models.rollout
    assert model is not None
    built = build(model, shape_of(pupil.config), groups if own == layout else parallel.also(own))
    load(built, TensorSource(pupil.weights))
    trained = trainable(built, optimizer, total_steps=10)
    return assembled(config, model, trained, policy, Grpo(), Phases())


def shards(model: MegatronModel, pupil: Pupil) -> Any:
    for held in held_parameters(model, table_of(shape_of(pupil.config))):
        rank = shard_group(model.groups, held.place.entry).rank
        copied = held.place.entry.axis is None
        yield held.place.names, 0 if copied else rank, main_gradient(held.parameter).clone()


def save_and_go_on(cut: Cut, batch: Batch, pupil: Pupil, folder: str) -> list[float]:
    """Two batches, a checkpoint after the first."""
    with started(Layout(**cut.policy)) as groups:
        model = opened(cut, batch, pupil, groups, distributed=True)
        first = model.learn(batch.rollouts, batch.advantages, 0, None)
        checkpoints_of(model, folder).save(1, {"weight": first.weight})
        return figures(model, batch, first.weight)


def resume(cut: Cut, batch: Batch, pupil: Pupil, folder: str) -> list[float]:
    with started(Layout(**cut.policy)) as groups:
        model = opened(cut, batch, pupil, groups, distributed=True)
        return figures(model, batch, checkpoints_of(model, folder).load()["weight"])


def checkpoints_of(model: RolloutModel, folder: str) -> Checkpoints:
    return Checkpoints(folder, {"rollout": model.trainer.trainable})


def figures(model: RolloutModel, batch: Batch, weight: float) -> list[float]:
    taught = model.learn(batch.rollouts, batch.advantages, 1, weight)
    return [taught.weight, *(taught.metrics[name] for name in sorted(taught.metrics))]
