"""The fixed batch through the real trainer, on the ranks of one layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_troll.batching.build import Form, build
from megatron_troll.batching.plan import Capacity, Schedule, plan
from megatron_troll.batching.weights import step_weights
from megatron_troll.config.tree import Layout, Model
from megatron_troll.mcore import model as mcore
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.router import routers
from megatron_troll.mcore.shape import shape_of
from megatron_troll.objectives import compose
from megatron_troll.parallel.groups import Groups
from megatron_troll.trainer import PolicyTrainer
from megatron_troll.types import MicroBatch, Readings
from megatron_troll.weights.export import stream
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.placement import held_parameters
from megatron_troll.weights.source import TensorSource
from tests.dist.layout_table import AXES, Sizes, formed_groups
from tests.dist.layouts_batch import OBJECTIVES, TEMPERATURE, Batch, Weights
from tests.dist.parameters import main_gradient, parameters_by_name
from tests.dist.tiny import MOE, started


@dataclass(frozen=True)
class Case:
    """One accumulation: an objective by name, how the batch is cut, the balancing loss's coefficient."""

    objective: str
    packed: bool
    token_budget: int
    aux: float


@dataclass(frozen=True)
class Outcome:
    """loss, metrics and mismatch as the trainer reports them; gradients of all Hugging Face tensors; the
    number of micro-batches on this rank; which collectives ran, as (axis, operation)."""

    loss: float
    metrics: dict[str, float]
    mismatch: dict[str, float]
    gradients: Weights
    micro_batches: int
    collectives: set[tuple[str, str]]


@dataclass(frozen=True)
class RankResult:
    """Sizes of the groups that were formed, parameter shapes by Megatron's names, the outcome of
    every case, and the gradient norm that an optimizer step after the last one reports."""

    groups: Sizes
    shapes: dict[str, tuple[int, ...]]
    outcomes: list[Outcome]
    grad_norm: float


def run_cases(config: Model, batch: Batch, cases: Sequence[Case]) -> RankResult:
    """Old readings at the weights `before`, gradients at the weights `now`."""
    with started(config.layout) as groups:
        model = mcore.build(config, shape_of(MOE), groups)
        policy = trainable(model, config.optimizer, total_steps=1)
        micro_batches = [cut(batch, case, groups, config.layout) for case in cases]
        load(model, TensorSource(batch.before))
        old = [trainer(policy, case).old_readings(m).readings for case, m in zip(cases, micro_batches)]
        load(model, TensorSource(batch.now))
        outcomes = [accumulate(policy, *each) for each in zip(cases, micro_batches, old)]
        shapes = {name: tuple(p.shape) for name, p in parameters_by_name(model).items()}
        return RankResult(formed_groups(groups), shapes, outcomes, policy.step())


def trainer(policy: Trainable, case: Case) -> PolicyTrainer:
    for router in routers(policy.model.chunks):
        router.coefficient = case.aux
    return PolicyTrainer(policy, compose(OBJECTIVES[case.objective]), Head(policy.model, TEMPERATURE))


def cut(batch: Batch, case: Case, groups: Groups, layout: Layout) -> list[MicroBatch]:
    """This rank's micro-batches of one optimizer step over the whole batch."""
    form = Form(
        vocab=MOE["vocab_size"],
        packed=case.packed,
        cp_rank=groups.cp.rank,
        cp_size=groups.cp.size,
        tp_size=groups.tp.size,
    )
    step = plan(
        [len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in batch.rollouts],
        [rollout.group for rollout in batch.rollouts],
        Schedule(updates=1, epochs=1, seed=0),
        Capacity(
            dp=groups.dp.size,
            token_budget=case.token_budget,
            align=form.align,
            multiple=layout.pp if layout.vpp else 1,
            packed=case.packed,
        ),
    ).steps[0]
    weights = step_weights(batch.rollouts, step.responses, OBJECTIVES[case.objective].aggregation, None)
    return [
        build(batch.rollouts, batch.advantages, weights, chosen, form)
        for chosen in step.ranks[groups.dp.rank]
    ]


def accumulate(
    policy: Trainable, case: Case, batches: Sequence[MicroBatch], old: Sequence[Readings]
) -> Outcome:
    learner = trainer(policy, case)
    mismatch = learner.mismatch(batches, old)
    with Collectives(policy.model.groups) as collectives:
        result = learner.accumulate(batches, old, [None] * len(batches))
    assert result.broken == ()
    unequal = unequal_replicas(policy.model)
    assert not unequal, unequal
    with gradients_as_parameters(policy.model):
        gradients = {name: tensor.clone() for name, tensor in stream(policy.model)}
    return Outcome(result.loss, result.metrics, mismatch, gradients, len(batches), collectives.seen)


def unequal_replicas(model: mcore.MegatronModel) -> list[str]:
    """Parameters that every tensor-parallel rank holds whole, whose gradients differ between them."""
    return [
        str(held.place.names)
        for held in held_parameters(model, table_of(model.shape))
        if held.place.entry.axis is None
        for other in model.groups.tp.all_gather(main_gradient(held.parameter))
        if not torch.equal(other, main_gradient(held.parameter))
    ]


@contextmanager
def gradients_as_parameters(model: mcore.MegatronModel) -> Iterator[None]:
    """So that gradients can be gathered as weights are."""
    parameters = parameters_by_name(model).values()
    values = [parameter.data for parameter in parameters]
    for parameter in parameters:
        parameter.data = main_gradient(parameter)
    yield
    for parameter, value in zip(parameters, values):
        parameter.data = value


class Collectives(TorchDispatchMode):
    """Which c10d operations ran, in forward and backward, on the groups of which axis."""

    def __init__(self, groups: Groups) -> None:
        super().__init__()
        handles = {axis: getattr(groups, axis).handle for axis in AXES}
        self.axes = {handle.group_name: axis for axis, handle in handles.items() if handle is not None}
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            for arg in args:
                if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
                    axis = self.axes.get(dist.ProcessGroup.unbox(arg).group_name)
                    if axis is not None:
                        self.seen.add((axis, func._opname))
        return func(*args, **(kwargs or {}))
