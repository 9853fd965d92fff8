"""Checkpoints of real Megatron models: resumed runs equal uninterrupted ones, on any layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_troll.config.tree import Layout, Model, Optimizer, Schedule
from megatron_troll.mcore.checkpoint import Checkpoints
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import build
from megatron_troll.mcore.optimizer import Trainable, trainable
from megatron_troll.mcore.schedule import accumulate
from megatron_troll.mcore.shape import read_shape
from megatron_troll.types import MicroBatch, Reads
from megatron_troll.weights.load import load
from megatron_troll.weights.source import FolderSource
from tests.dist.harness import RankPool
from tests.dist.tiny import MOE, started, write_reference

LAYOUTS = {
    "alone": (1, {}),
    "tp2-ep2": (2, {"tp": 2, "ep": 2}),
    "pp2": (2, {"pp": 2}),
    "ep2": (2, {"ep": 2}),
    "dp2": (2, {}),
}
SEQUENCES, LENGTH, STEPS = 4, 16, 2

Step = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """How a model is built on the ranks that a test gets."""

    path: str
    sizes: dict[str, int]
    dtype: str = "fp32"
    distributed: bool = True


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    write_reference(MOE, folder)
    return str(folder)


@contextmanager
def training(run: Run) -> Iterator[Trainable]:
    """A model with the weights of the folder, AdamW and a warm-up over 10 steps."""
    layout = Layout(**run.sizes)
    optimizer = Optimizer(
        lr=1e-3, weight_decay=0.1, distributed=run.distributed, schedule=Schedule(warmup_steps=10)
    )
    config = Model.model_validate(
        {"path": run.path, "dtype": run.dtype, "layout": layout, "optimizer": optimizer}
    )
    with started(layout) as groups:
        model = build(config, read_shape(run.path), groups)
        load(model, FolderSource(run.path))
        trained = trainable(model, optimizer, total_steps=100)
        trained.reload_weights()
        yield trained


def train(trained: Trainable, first: int) -> list[Step]:
    """(loss, gradient norm) of `STEPS` steps of next-token prediction, each on tokens of its own."""
    return [train_step(trained, step) for step in range(first, first + STEPS)]


def train_step(trained: Trainable, step: int) -> Step:
    groups, head = trained.model.groups, Head(trained.model)
    batches = micro_batches(step)[groups.dp.rank :: groups.dp.size]

    def loss(i: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        logp = head.read(hidden, batches[i].target, Reads(logp=True)).logp
        assert logp is not None
        value = -(batches[i].weight * logp).sum()
        return value, value.detach()

    values = accumulate(trained.model, batches, loss)
    total = sum(values) if groups.tp.rank == 0 else torch.zeros(())
    total = groups.world.all_reduce(torch.as_tensor(total, dtype=torch.float64))
    return total.item(), trained.step()


def micro_batches(step: int) -> list[MicroBatch]:
    """Two micro-batches of two sequences, in which every token but the first is predicted."""
    tokens = torch.randint(
        0, MOE["vocab_size"], (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(step)
    )
    return [micro_batch(part) for part in tokens.chunk(2)]


def micro_batch(tokens: Tensor) -> MicroBatch:
    rows = tokens.shape[0]
    index = (torch.arange(rows)[:, None] * LENGTH + torch.arange(LENGTH - 1)).reshape(-1)
    ones = torch.ones(len(index))
    return MicroBatch(
        tokens=tokens,
        positions=torch.arange(LENGTH).expand(rows, -1),
        padding=torch.zeros_like(tokens, dtype=torch.bool),
        cu_seqlens=None,
        max_seqlen=LENGTH,
        index=index,
        target=tokens[:, 1:].reshape(-1),
        sequence=index // LENGTH,
        position=index % LENGTH,
        weight=ones / (SEQUENCES * (LENGTH - 1)),
        advantage=ones,
        rollout_logp=ones,
        rollout_topk=None,
        rollouts=tuple(range(rows)),
    )


def save_then_continue(run: Run, folder: str) -> list[Step]:
    with training(run) as trained:
        train(trained, 0)
        Checkpoints(folder, {"policy": trained}).save(10, {"position": 3})
        return train(trained, STEPS)


def resume(run: Run, folder: str) -> list[Step]:
    with training(run) as trained:
        spoil(trained)
        assert Checkpoints(folder, {"policy": trained}).load() == {"position": 3}
        return train(trained, STEPS)


def spoil(trained: Trainable) -> None:
    """Whatever a load does not overwrite shows in the next steps."""
    train_step(trained, 99)
    with torch.no_grad():
        for stage in trained.model.stages:
            for parameter in stage.parameters():
                parameter.add_(1.0)


@pytest.fixture(scope="module")
def saved(
    path: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, tuple[str, list[Step]]]:
    """layout -> (folder with a checkpoint, the steps that followed it without interruption)."""
    made = {}
    for name, (world, sizes) in LAYOUTS.items():
        folder = str(tmp_path_factory.mktemp(name))
        made[name] = folder, on(request, world).run(save_then_continue, Run(path, sizes), folder)[0]
    return made


def on(request: pytest.FixtureRequest, world: int) -> RankPool:
    return request.getfixturevalue(f"ranks{world}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(
    layout: str, path: str, saved: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    folder, uninterrupted = saved[layout]
    assert on(request, world).run(resume, Run(path, sizes), folder)[0] == uninterrupted
