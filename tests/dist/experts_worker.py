"""Steps of a tiny model on one fixed batch, and what its routers did."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_troll.batching.build import Form, build
from megatron_troll.config import Model
from megatron_troll.mcore import model as mcore
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.router import expert_loads, routers
from megatron_troll.mcore.schedule import accumulate, infer
from megatron_troll.mcore.shape import shape_of
from megatron_troll.types import HeadRequest, MicroBatch
from megatron_troll.weights.load import load
from megatron_troll.weights.source import TensorSource
from tests.dist.layouts_batch import TEMPERATURE, Batch, Weights
from tests.dist.layouts_worker import streamed
from tests.dist.tiny import started

Loads = dict[int, Tensor]


@dataclass(frozen=True)
class Routed:
    """loads: of each step, layer -> tokens per expert; biases: the same after each step, for the layers of
    this rank; before, after: Hugging Face tensors around all steps."""

    loads: list[Loads]
    biases: list[Loads]
    before: Weights
    after: Weights


def run_steps(config: Model, batch: Batch, steps: int) -> Routed:
    """`steps` optimizer steps on the whole batch, in micro-batches of one response."""
    shape = shape_of(batch.config)
    with started(config.layout) as groups:
        model = mcore.build(config, shape, groups)
        load(model, TensorSource(batch.now))
        policy = trainable(model, config.optimizer, total_steps=steps)
        form = Form(
            shape.vocab,
            cp_rank=groups.cp.rank,
            cp_size=groups.cp.size,
            tp_size=groups.tp.size,
            temperature=TEMPERATURE,
        )
        batches = micro_batches(batch, form, groups.dp.rank, groups.dp.size)
        loads, biases, before = [], [], streamed(model)
        for _ in range(steps):
            infer(model, batches, lambda i, hidden: None)  # is not counted
            accumulate(model, batches, lambda i, hidden: loss_of(model, batches[i], hidden))
            loads.append(expert_loads(model.chunks, groups.pp))
            policy.step()
            biases.append({each.layer_number - 1: bias_of(each) for each in routers(model.chunks)})
        return Routed(loads, biases, before, streamed(model))


def micro_batches(batch: Batch, form: Form, rank: int, size: int) -> list[MicroBatch]:
    """Those of one data-parallel rank: the responses are dealt out, and all ranks get equally many."""
    rollouts = batch.rollouts
    weights = [1.0 / len(rollouts)] * len(rollouts)
    dealt = [list(range(i, len(rollouts), size)) for i in range(size)]
    rounds = max(map(len, dealt))
    mine = [[i] for i in dealt[rank]] + [[]] * (rounds - len(dealt[rank]))
    return [build(rollouts, batch.advantages, weights, chosen, form) for chosen in mine]


def loss_of(model: mcore.MegatronModel, batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, None]:
    logp = Head(model, TEMPERATURE).read(hidden, batch.target, HeadRequest(logp=True)).logp
    assert logp is not None
    return -(batch.weight * logp).sum(), None


def bias_of(router: Any) -> Tensor:
    return torch.empty(0) if router.expert_bias is None else router.expert_bias.clone()


def route(logits: Tensor, bias: Tensor | None, config: Model, sizes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Probs and map [n, E] of the first layer's router for logits [n, E]."""
    with started(config.layout) as groups:
        model = mcore.build(config, shape_of(sizes), groups, trained=False)
        router: Any = routers(model.chunks)[0]
        if bias is not None:
            router.expert_bias.copy_(bias)
        return router.routing(logits[:, None])
