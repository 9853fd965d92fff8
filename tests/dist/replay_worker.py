"""Rollouts with the experts of the in-process engine, and what routers choose for their tokens afterwards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_troll import rollout
from megatron_troll.batching.build import Form, build
from megatron_troll.config import Config, Model, Models, Sampling, Train
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.router import recording, routers
from megatron_troll.mcore.schedule import infer
from megatron_troll.rollout.engine import Setup
from megatron_troll.rollout.records import share_records
from megatron_troll.training.microbatches import routing_of
from megatron_troll.types import MicroBatch, Rollout
from tests.dist.generation_worker import STOPS, TOKENIZER, VOCAB, opened, requests
from tests.dist.layout_table import Sizes


@dataclass(frozen=True)
class Choices:
    """On one rank: all rollouts; the share of its real tokens' choices that are the recorded ones, with
    routers as they drew, then moved, then moved and told to replay."""

    rollouts: list[Rollout]
    unchanged: float
    moved: float
    replayed: float


def draw_and_replay(sizes: Sizes, folder: str) -> Choices:
    with opened(sizes, folder) as model:
        config = Config(
            name="run", seed=3, models=Models(policy=Model(path="unused")), train=Train(replay="rollout")
        )
        engine = rollout.build(Setup(config, model, Path(config.policy.path), TOKENIZER, STOPS))
        rollouts = engine.generate(requests(), Sampling(max_tokens=8), 1)
        rollouts = share_records(rollouts, range(len(rollouts)), model.groups)
        batches = packed(model, rollouts)
        free = [replace(batch, experts=None) for batch in batches]
        unchanged = agreement(model, batches, chosen(model, free))
        generator = torch.Generator().manual_seed(7)
        for router in routers(model.chunks):
            router.weight.data += 0.5 * torch.randn(router.weight.shape, generator=generator)
        moved = agreement(model, batches, chosen(model, free))
        return Choices(rollouts, unchanged, moved, agreement(model, batches, chosen(model, batches)))


def packed(model: MegatronModel, rollouts: Sequence[Rollout]) -> list[MicroBatch]:
    """This data-parallel rank's share, in two micro-batches."""
    groups, ones = model.groups, [1.0] * len(rollouts)
    form = Form(VOCAB, tp_size=groups.tp.size, routing=routing_of(model))
    mine = range(groups.dp.rank, len(rollouts), groups.dp.size)
    return [build(rollouts, ones, ones, picked, form) for picked in (mine[::2], mine[1::2])]


def chosen(model: MegatronModel, batches: Sequence[MicroBatch]) -> dict[int, list[Tensor]]:
    with recording(model.chunks) as found:
        infer(model, batches, lambda i, hidden: None)
    return found


def agreement(model: MegatronModel, batches: Sequence[MicroBatch], found: dict[int, list[Tensor]]) -> float:
    tp, same = model.groups.tp, []
    for i, batch in enumerate(batches):
        real = ~batch.padding[0].chunk(tp.size)[tp.rank].numpy()
        for layer, recorded in (batch.experts or {}).items():
            same.append((found[layer][i].numpy() == recorded.numpy())[real])
    return float(np.concatenate(same).mean())
