"""The methods on the fixed batch, cut by the learner's own MicroBatcher and run by the real trainer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.shape import shape_of
from megatron_troll.objectives import compose
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.training.reference import Reference, open_reference
from megatron_troll.training.trainer import PolicyTrainer
from megatron_troll.types import HeadOutputs, HeadRequest, MicroBatch
from megatron_troll.weights.load import load
from megatron_troll.weights.source import TensorSource
from tests.dist.layouts_batch import TEMPERATURE, Weights
from tests.dist.layouts_worker import gradients_of
from tests.dist.methods_batch import ENGINE_K, Batch
from tests.dist.methods_table import METHODS
from tests.dist.tiny import MOE, started


@dataclass(frozen=True)
class Cut:
    """How a step becomes micro-batches on the ranks of a layout; `shared`: packed ones read a prompt once."""

    sizes: dict[str, int]
    packed: bool
    token_budget: int
    shared: bool = True


@dataclass(frozen=True)
class Outcome:
    """loss and metrics as the trainer reports them; gradients of all Hugging Face tensors, on rank 0; the
    rollouts of each micro-batch on this rank."""

    loss: float
    metrics: dict[str, float]
    gradients: Weights
    rollouts: list[tuple[int, ...]]


@contextmanager
def opened(cut: Cut, batch: Batch, frozen: str) -> Iterator[tuple[Trainable, Reference | None]]:
    """The policy at the weights `before`, and the reference model in the folder `frozen`."""
    layout = Layout(**cut.sizes)
    config = Model(path=frozen, dtype="fp32", layout=layout, optimizer=Optimizer(distributed=False))
    with started(layout) as groups:
        model = build(config, shape_of(MOE), groups)
        policy = trainable(model, config.optimizer, total_steps=1)
        load(model, TensorSource(batch.before))
        yield policy, open_reference(config, model, TEMPERATURE, HeadRequest())


def run_methods(cut: Cut, batch: Batch, frozen: str, names: Sequence[str]) -> dict[str, Outcome]:
    """Old readings at the weights `before`, gradients at the weights `now`."""
    with opened(cut, batch, frozen) as (policy, beside):
        arranged = {name: arrange(name, cut, batch, policy.model) for name in names}
        trainers = {name: trainer(name, policy, beside) for name in names}
        old = {name: trainers[name].old_readings(arranged[name]).readings for name in names}
        load(policy.model, TensorSource(batch.now))
        return {name: accumulate(trainers[name], arranged[name], old[name]) for name in names}


def run_first_steps(
    cut: Cut, batch: Batch, frozen: str, names: Sequence[str]
) -> dict[str, tuple[Outcome, Outcome]]:
    """The first optimizer step of an update, beside old readings made in a pass before it and by its own."""
    with opened(cut, batch, frozen) as (policy, beside):
        outcomes = {}
        for name in names:
            batches, learner = arrange(name, cut, batch, policy.model), trainer(name, policy, beside)
            old = learner.old_readings(batches).readings
            own = None if METHODS[name].config.old == "trainer" else old
            outcomes[name] = accumulate(learner, batches, old), accumulate(learner, batches, own)
        return outcomes


def arrange(name: str, cut: Cut, batch: Batch, model: MegatronModel) -> Sequence[MicroBatch]:
    """This rank's micro-batches of one optimizer step over the whole batch."""
    objective = METHODS[name].config
    config = Config(
        name=name,
        models=Models(policy=Model(path="none")),
        data=Data(files=("none",)),
        rollout=RolloutConfig(sampling=Sampling(temperature=TEMPERATURE)),
        objective=objective,
        train=Train(
            updates=1,
            packing=cut.packed,
            share_prefixes=cut.packed and cut.shared,
            token_budget=cut.token_budget,
        ),
    )
    advantages = batch.token_advantages if objective.advantage.name == "gae" else batch.advantages
    batcher = MicroBatcher(config, model, Layout(**cut.sizes), topk=ENGINE_K)
    return batcher.updates(batch.rollouts, advantages, step=0)[0]


def trainer(name: str, policy: Trainable, beside: Reference | None) -> PolicyTrainer:
    config = METHODS[name].config
    objective, reference = compose(config), None
    if objective.needs_reference:
        assert beside is not None
        reference = replace(beside, reads=objective.reads_reference)
    head = Head(policy.model, TEMPERATURE)
    return PolicyTrainer(policy, objective, head, config.old, reference, config.aggregation)


def accumulate(
    trainer: PolicyTrainer, batches: Sequence[MicroBatch], old: Sequence[HeadOutputs] | None
) -> Outcome:
    model, reference = trainer.trainable.model, trainer.reference
    kept = [None] * len(batches) if reference is None else reference.keep(batches)
    result = trainer.accumulate(batches, old, kept)
    assert result.broken == ()
    gradients = gradients_of(model)
    first = model.groups.world.rank == 0
    return Outcome(
        result.loss, result.metrics, gradients if first else {}, [batch.rollouts for batch in batches]
    )
