"""A critic on the ranks of a layout, alone and beside a policy of another layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_troll.config import (
    Config,
    CriticOptimizer,
    Data,
    Layout,
    Model,
    Models,
    Optimizer,
    RolloutConfig,
    Sampling,
    Train,
)
from megatron_troll.config import CriticConfig as CriticModel
from megatron_troll.mcore.checkpoint import Checkpoints
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.observe.phases import Phases
from megatron_troll.training.critic import Critic, open_critic
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.types import Rollout
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.placement import held_parameters, shard_group
from megatron_troll.weights.source import TensorSource
from megatron_troll.weights.table import Table
from megatron_troll.weights.value import value_table
from tests.dist.layouts_batch import TEMPERATURE
from tests.dist.methods_batch import Batch
from tests.dist.methods_worker import Cut, accumulate, arrange, trainer
from tests.dist.parameters import main_gradient
from tests.dist.tiny import MOE, started

CLIPPED_NEVER = 1e9
Shard = tuple[tuple[str, ...], int, Tensor]


@dataclass(frozen=True)
class Task:
    """What a critic is given: rollouts and a target for each of their tokens [T], the folder of its body, and
    a value head [1, h] in place of zeros, under which no gradient would reach the body."""

    rollouts: list[Rollout]
    targets: list[np.ndarray]
    folder: str
    head: Tensor


@dataclass(frozen=True)
class Seen:
    """values [L] of all tokens, what learning reports, and this rank's gradients: names of the Hugging Face
    tensors, the shard's number, the gradient."""

    values: Tensor
    metrics: dict[str, float]
    gradients: list[Shard]


@dataclass(frozen=True)
class Sizes:
    policy: dict[str, int]
    critic: dict[str, int]


def run_critic(cut: Cut, task: Task) -> Seen:
    """One update of a critic that has the ranks to itself."""
    layout = Layout(**cut.sizes)
    with started(layout) as groups:
        policy = build(Model(path="none", dtype="fp32", layout=layout), shape_of(MOE), groups, trained=False)
        critic = opened(task, policy, layout, cut, distributed=False)
        values = critic.values(task.rollouts, step=0)
        metrics = critic.learn(task.rollouts, task.targets, step=0)
        return Seen(values.value, metrics, list(shards(critic.trained.model)))


def opened(task: Task, policy: MegatronModel, layout: Layout, cut: Cut, *, distributed: bool) -> Critic:
    """A critic on the layout of `cut` beside a policy on `layout`."""
    optimizer = CriticOptimizer(lr=1e-3, grad_norm=CLIPPED_NEVER, distributed=distributed)
    own = Layout(**cut.sizes)
    config = Config(
        name="critic",
        models=Models(
            policy=Model(path="none", layout=layout),
            critic=CriticModel(path=task.folder, dtype="fp32", layout=own, optimizer=optimizer),
        ),
        data=Data(files=("none",)),
        rollout=RolloutConfig(sampling=Sampling(temperature=TEMPERATURE)),
        train=Train(updates=1, packing=cut.packed, token_budget=cut.token_budget),
    )
    critic = open_critic(config, policy, Phases())
    for stage in critic.trained.model.stages:
        if stage.post_process:
            with torch.no_grad():
                stage.output_weight.copy_(task.head)
    critic.trained.optimizer.reload_model_params()
    return critic


def table() -> Table:
    shape = shape_of(MOE)
    return value_table(table_of(shape), shape.hidden)


def shards(model: MegatronModel) -> Iterator[Shard]:
    for held in held_parameters(model, table()):
        rank = shard_group(model.groups, held.place.entry).rank
        copied = held.place.entry.axis is None
        yield held.place.names, 0 if copied else rank, main_gradient(held.parameter).clone()


@dataclass(frozen=True)
class Pair:
    """A policy and its critic, each on its own layout of the same ranks."""

    policy: PolicyTrainer
    critic: Critic
    cut: Cut
    batch: Batch
    task: Task

    def policy_loss(self) -> tuple[float, dict[str, float]]:
        """The loss and the norms of this rank's gradients, without a step."""
        model = self.policy.trainable.model
        micro_batches = arrange("gae", self.cut, self.batch, model)
        old = self.policy.old_readings(micro_batches).readings
        outcome = accumulate(self.policy, micro_batches, old)
        return outcome.loss, {name: float(g.norm()) for name, g in outcome.gradients.items()}

    def train(self) -> list[float]:
        """A step of both: the loss and gradient norm of each."""
        loss, _ = self.policy_loss()
        norm = self.policy.trainable.step()
        learned = self.critic.learn(self.task.rollouts, self.task.targets, step=0)
        return [loss, norm, learned["critic_loss"], learned["critic_grad_norm"]]

    def checkpoints(self, folder: str) -> Checkpoints:
        return Checkpoints(folder, {"policy": self.policy.trainable, "critic": self.critic.trained})


@contextmanager
def paired(sizes: Sizes, batch: Batch, task: Task) -> Iterator[Pair]:
    layout = Layout(**sizes.policy)
    optimizer = Optimizer(lr=1e-3, grad_norm=CLIPPED_NEVER, distributed=False)
    config = Model(path="none", dtype="fp32", layout=layout, optimizer=optimizer)
    with started(layout) as groups:
        model = build(config, shape_of(MOE), groups)
        load(model, TensorSource(batch.now))
        policy = trainer("gae", trainable(model, optimizer, total_steps=10), None)
        cut = Cut(sizes.critic, packed=True, token_budget=48)
        critic = opened(task, model, layout, cut, distributed=True)
        yield Pair(policy, critic, Cut(sizes.policy, packed=True, token_budget=48), batch, task)


@dataclass(frozen=True)
class Beside:
    """What a critic saw, its tensor- and data-parallel size, and the policy's loss and gradient norms before
    and after it."""

    values: Tensor
    critic_sizes: tuple[int, int]
    before: tuple[float, dict[str, float]]
    after: tuple[float, dict[str, float]]


def run_beside(sizes: Sizes, batch: Batch, task: Task) -> Beside:
    with paired(sizes, batch, task) as pair:
        before = pair.policy_loss()
        values = pair.critic.values(task.rollouts, step=0)
        pair.critic.learn(task.rollouts, task.targets, step=0)
        groups = pair.critic.trained.model.groups
        return Beside(values.value, (groups.tp.size, groups.dp.size), before, pair.policy_loss())


def save_then_continue(sizes: Sizes, batch: Batch, task: Task, folder: str) -> list[list[float]]:
    with paired(sizes, batch, task) as pair:
        pair.train()
        pair.checkpoints(folder).save(1, {})
        return [pair.train(), pair.train()]


def resume(sizes: Sizes, batch: Batch, task: Task, folder: str) -> list[list[float]]:
    with paired(sizes, batch, task) as pair:
        pair.train()
        pair.train()  # whatever a load leaves as it was shows in the next steps
        pair.checkpoints(folder).load()
        return [pair.train(), pair.train()]
