"""A few steps of training on a fixed batch, the same on every layout: what checkpoints are tested with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_troll.config import Layout, LearningRateSchedule, Model, Optimizer
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import build
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.schedule import accumulate
from megatron_troll.mcore.shape import shape_of
from megatron_troll.parallel.groups import Groups
from megatron_troll.types import HeadRequest, MicroBatch
from megatron_troll.weights.load import load
from megatron_troll.weights.source import TensorSource
from tests.dist.tiny import MOE, started, unpacked

SEQUENCES, LENGTH, STEPS = 4, 16, 2

Step = tuple[float, float]
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Run:
    """How a model is built on the ranks that a test gets. `config` is of Hugging Face."""

    weights: Weights
    sizes: dict[str, int]
    config: dict[str, Any]
    dtype: str = "fp32"
    distributed: bool = True
    optimizer: str = "adamw"


@contextmanager
def training(run: Run) -> Iterator[Trainable]:
    with started(Layout(**run.sizes)) as groups:
        yield made(run, groups)


def made(run: Run, groups: Groups) -> Trainable:
    """A model with the run's weights, its optimizer and a warm-up over 10 steps."""
    optimizer = Optimizer.model_validate(
        {
            "name": run.optimizer,
            "lr": 1e-3,
            "weight_decay": 0.1,
            "distributed": run.distributed,
            "schedule": LearningRateSchedule(warmup_steps=10),
        }
    )
    config = Model.model_validate(
        {"path": "none", "dtype": run.dtype, "layout": Layout(**run.sizes), "optimizer": optimizer}
    )
    model = build(config, shape_of(run.config), groups)
    load(model, TensorSource(run.weights))
    trained = trainable(model, optimizer, total_steps=100)
    trained.optimizer.reload_model_params()
    return trained


def train(trained: Trainable, first: int) -> list[Step]:
    """(loss, gradient norm) of `STEPS` steps of next-token prediction, each on tokens of its own."""
    return [train_step(trained, step) for step in range(first, first + STEPS)]


def train_step(trained: Trainable, step: int) -> Step:
    trained.optimizer.zero_grad()
    groups, head = trained.model.groups, Head(trained.model)
    batches = micro_batches(step)[groups.dp.rank :: groups.dp.size]

    def loss(i: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden.to(trained.model.config.params_dtype)
        logp = head.read(hidden, batches[i].target, HeadRequest(logp=True)).logp
        assert logp is not None
        value = -(batches[i].weight * logp).sum()
        return value, value.detach()

    values = accumulate(trained.model, batches, loss)
    total = torch.tensor(sum(map(float, values)) if groups.tp.rank == 0 else 0.0, dtype=torch.float64)
    return groups.world.all_reduce(total).item(), trained.step()


def micro_batches(step: int) -> list[MicroBatch]:
    """Two micro-batches of two sequences, in which every token but the first is predicted."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, MOE["vocab_size"], (SEQUENCES, LENGTH), generator=generator)
    return [micro_batch(part) for part in tokens.chunk(2)]


def micro_batch(tokens: Tensor) -> MicroBatch:
    positions = torch.arange(LENGTH)
    index = (torch.arange(len(tokens))[:, None] * LENGTH + positions[:-1]).reshape(-1)
    batch = unpacked(tokens, positions, LENGTH, index, tokens[:, 1:].reshape(-1))
    return replace(batch, weight=batch.weight / (SEQUENCES * (LENGTH - 1)))


@torch.no_grad()
def fill(trained: Trainable, value: float) -> None:
    """Every weight, and the optimizer's copy of it, becomes `value`."""
    for stage in trained.model.stages:
        for parameter in stage.parameters():
            parameter.fill_(value)
    trained.optimizer.reload_model_params()


def values_of(trained: Trainable) -> set[float]:
    """The distinct values of all weights on this rank."""
    parameters = [parameter for stage in trained.model.stages for parameter in stage.parameters()]
    return {value for parameter in parameters for value in parameter.detach().unique().tolist()}
