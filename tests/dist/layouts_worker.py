"""The fixed batch through the real trainer, on the ranks of one layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_troll.batching.build import Form, build
from megatron_troll.batching.experts import Routing
from megatron_troll.batching.plan import Capacity, UpdateSchedule, plan, step_weights
from megatron_troll.batching.prefixes import shared_prefixes
from megatron_troll.config import Layout, Model
from megatron_troll.mcore import model as mcore
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.router import routers
from megatron_troll.mcore.shape import shape_of
from megatron_troll.objectives import compose
from megatron_troll.parallel.groups import Groups
from megatron_troll.training import trainer as policy_trainer
from megatron_troll.training.microbatches import routing_of
from megatron_troll.training.trainer import OldPolicyOutputs, PolicyTrainer
from megatron_troll.types import MicroBatch
from megatron_troll.weights.export import stream
from megatron_troll.weights.families import table_of
from megatron_troll.weights.load import load
from megatron_troll.weights.placement import held_parameters
from megatron_troll.weights.source import TensorSource
from tests.dist.layout_table import AXES, Sizes, formed_groups
from tests.dist.layouts_batch import OBJECTIVES, TEMPERATURE, Batch, K, Weights
from tests.dist.layouts_reference import Old, Replay
from tests.dist.parameters import constants_of, main_gradient, parameters_by_name, trained_parameters
from tests.dist.tiny import started


@dataclass(frozen=True)
class Case:
    """One accumulation: an objective by name, how the batch is cut, the balancing loss's coefficient, whose
    log-probs are the old policy, whose experts are replayed, whether prompts are read once for a group."""

    objective: str
    packed: bool
    token_budget: int
    aux: float
    old: Old = "trainer"
    replay: Replay = "none"
    shared: bool = False


@dataclass(frozen=True)
class Outcome:
    """loss, metrics and mismatch as the trainer reports them; gradients of all Hugging Face tensors, none
    where a distributed optimizer has scattered them; the number of micro-batches on this rank; which
    collectives ran, as (axis, operation)."""

    loss: float
    metrics: dict[str, float]
    mismatch: dict[str, float]
    gradients: Weights
    micro_batches: int
    collectives: set[tuple[str, str]]


@dataclass(frozen=True)
class RankResult:
    """Sizes of the groups that were formed, parameter shapes by Megatron's names, the outcome of every case;
    the gradient norm that an optimizer step after the last one reports, and how it changes the weights."""

    groups: Sizes
    shapes: dict[str, tuple[int, ...]]
    outcomes: list[Outcome]
    grad_norm: float
    change: Weights


def run_cases(config: Model, batch: Batch, cases: Sequence[Case], bucket: int | None = None) -> RankResult:
    """Old readings at the weights `before`, gradients at the weights `now`. `bucket`: numbers in a bucket of
    gradients, by default Megatron's 40 million."""
    with started(config.layout) as groups, buckets_of(bucket):
        model = mcore.build(config, shape_of(batch.config), groups)
        policy = trainable(model, config.optimizer, total_steps=1)
        routing = routing_of(model)
        micro_batches = [cut(batch, case, groups, config.layout, routing) for case in cases]
        load(model, TensorSource(batch.before))
        old = [trainer(policy, case).old_readings(m) for case, m in zip(cases, micro_batches)]
        load(model, TensorSource(batch.now))
        policy.optimizer.reload_model_params()
        scattered = config.optimizer.distributed
        outcomes = [accumulate(policy, *each, scattered) for each in zip(cases, old)]
        shapes = {name: tuple(p.shape) for name, p in parameters_by_name(model).items()}
        weights, grad_norm = streamed(model), policy.step()
        change = {name: tensor - weights[name] for name, tensor in streamed(model).items()}
        return RankResult(formed_groups(groups), shapes, outcomes, grad_norm, change)


def run_probing_all(config: Model, batch: Batch, cases: Sequence[Case]) -> RankResult:
    """`run_cases`, with full rows read at every position."""
    with mock.patch.object(policy_trainer, "PROBED_POSITIONS", 10**6):
        return run_cases(config, batch, cases)


@contextmanager
def buckets_of(size: int | None) -> Iterator[None]:
    settings = partial(mcore.DistributedDataParallelConfig, bucket_size=size)
    with mock.patch.object(mcore, "DistributedDataParallelConfig", settings):
        yield


def trainer(policy: Trainable, case: Case) -> PolicyTrainer:
    for router in routers(policy.model.chunks):
        router.coefficient = case.aux
    objective = compose(OBJECTIVES[case.objective])
    return PolicyTrainer(policy, objective, Head(policy.model, TEMPERATURE), case.old, replay=case.replay)


def cut(
    batch: Batch, case: Case, groups: Groups, layout: Layout, routing: Routing | None = None
) -> list[MicroBatch]:
    """This rank's micro-batches of one optimizer step over the whole batch."""
    form = Form(
        vocab=batch.config["vocab_size"],
        packed=case.packed,
        shared=case.shared,
        cp_rank=groups.cp.rank,
        cp_size=groups.cp.size,
        tp_size=groups.tp.size,
        topk=K if case.old == "engine" else 0,
        temperature=TEMPERATURE,
        routing=routing if case.replay == "rollout" else None,
    )
    prefixes = shared_prefixes(batch.rollouts, case.replay == "rollout")
    step = plan(
        [len(rollout.prompt_ids) + len(rollout.response_ids) - 1 for rollout in batch.rollouts],
        [rollout.group for rollout in batch.rollouts],
        UpdateSchedule(updates=1, epochs=1, seed=0),
        Capacity(
            dp=groups.dp.size,
            token_budget=case.token_budget,
            align=form.align,
            multiple=layout.pp if layout.vpp else 1,
            packed=case.packed,
        ),
        [found[0].end if found else 0 for found in prefixes] if case.shared else None,
    ).steps[0]
    weights = step_weights(batch.rollouts, step.responses, OBJECTIVES[case.objective].aggregation, None)
    return [
        build(batch.rollouts, batch.advantages, weights, chosen, form, prefixes)
        for chosen in step.ranks[groups.dp.rank]
    ]


def accumulate(policy: Trainable, case: Case, before: OldPolicyOutputs, scattered: bool) -> Outcome:
    learner, batches, old = trainer(policy, case), before.batches, before.readings
    mismatch = learner.mismatch(batches, old)
    with Collectives(policy.model.groups) as collectives:
        result = learner.accumulate(batches, old, [None] * len(batches))
    assert result.broken == ()
    gradients = {} if scattered else gradients_of(policy.model)
    return Outcome(result.loss, result.metrics, mismatch, gradients, len(batches), collectives.seen)


def gradients_of(model: mcore.MegatronModel) -> Weights:
    unequal = unequal_replicas(model)
    assert not unequal, unequal
    with gradients_as_parameters(model):
        return {
            name: tensor for name, tensor in streamed(model).items() if name not in constants_of(model.shape)
        }


def streamed(model: mcore.MegatronModel) -> Weights:
    return {name: tensor.clone() for name, tensor in stream(model)}


def unequal_replicas(model: mcore.MegatronModel) -> list[str]:
    """Parameters that every tensor-parallel rank holds whole, whose gradients differ between them."""
    return [
        str(held.place.names)
        for held in held_parameters(model, table_of(model.shape))
        if held.place.entry.axis is None and held.place.entry.trained
        for other in model.groups.tp.all_gather(main_gradient(held.parameter))
        if not torch.equal(other, main_gradient(held.parameter))
    ]


@contextmanager
def gradients_as_parameters(model: mcore.MegatronModel) -> Iterator[None]:
    """So that gradients can be gathered as weights are."""
    parameters = trained_parameters(model)
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
