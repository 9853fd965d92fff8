"""What a trainer's rank does in these tests: give its weights to servers, let them draw, and read the same tokens
by a forward of its own."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_troll import rollout
from megatron_troll.batching.build import Form, build
from megatron_troll.config.tree import Config, Model, Models, RolloutConfig, Sampling
from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.schedule import infer
from megatron_troll.rollout.engine import Engine, Setup, requests_for
from megatron_troll.types import Rollout
from tests.dist.generation_worker import opened
from tests.dist.layout_table import Sizes
from tests.sglang.model import PROMPTS, VOCAB, ends

SAMPLES = 4


@dataclass(frozen=True)
class Job:
    """A trainer: its layout, the folder of its weights, where its runs go, and its `rollout` settings."""

    sizes: Sizes
    folder: Path
    runs: Path
    sglang: dict[str, Any]
    sampling: dict[str, Any]
    name: str = "run"

    @property
    def config(self) -> Config:
        policy = Model(path=str(self.folder), dtype="fp32")
        settings = {"engine": "sglang", "top_k": VOCAB, "sampling": self.sampling, "sglang": self.sglang}
        return Config(
            name=self.name,
            runs=str(self.runs),
            models=Models(policy=policy),
            rollout=RolloutConfig.model_validate(settings),
        )


@dataclass(frozen=True)
class Drawn:
    """rollouts of one version; laws [T, V] of each on the trainer's last stage, [] elsewhere; what the sync
    said."""

    rollouts: list[Rollout]
    laws: list[np.ndarray]
    synced: dict[str, float]


def engine_of(job: Job, model: MegatronModel) -> Engine:
    tokenizer = load_tokenizer(job.folder)
    return rollout.build(Setup(job.config, model, tokenizer, ends(job.folder), PROMPTS))


def draw(engine: Engine, version: int) -> Drawn:
    """The answers of `version`, after a sync."""
    synced = engine.sync(version)
    sampling = engine.setup.rollout.sampling
    rollouts = engine.generate(requests_for(PROMPTS, SAMPLES, engine.setup.tokenizer), sampling, version)
    return Drawn(rollouts, laws(engine.setup.model, rollouts, sampling), synced)


def laws(model: MegatronModel, rollouts: Sequence[Rollout], sampling: Sampling) -> list[np.ndarray]:
    groups, ones = model.groups, [1.0] * len(rollouts)
    form = Form(VOCAB, tp_size=groups.tp.size, temperature=sampling.law_temperature)
    batches = [build(rollouts, ones, ones, [i], form) for i in range(len(rollouts))]
    head = Head(model, sampling.law_temperature)

    def read(i: int, hidden: Tensor) -> np.ndarray:
        return torch.cat(groups.tp.all_gather(head.log_probs(hidden)), -1)[:, :VOCAB].numpy()

    model.train(False)
    try:
        return infer(model, batches, read)
    finally:
        model.train()


def perturb(model: MegatronModel) -> None:
    """As an update does: every weight is another one, on every rank alike where it has copies."""
    with torch.no_grad():
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.05)


def draw_twice(job: Job) -> list[Drawn]:
    """Two versions of the weights, on one rank of a pool."""
    with opened(job.sizes, str(job.folder)) as model:
        engine = engine_of(job, model)
        try:
            first = draw(engine, 1)
            perturb(model)
            return [first, draw(engine, 2)]
        finally:
            engine.close()
