"""What a trainer's rank does in these tests: give its weights to servers, let them draw, and read the same
tokens by a forward of its own."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from megatron_troll import rollout
from megatron_troll.batching.build import Form, build
from megatron_troll.config import Config, Model, Models, RolloutConfig, Sampling
from megatron_troll.data.tokenizer import load_tokenizer
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.schedule import infer
from megatron_troll.rollout.engine import Engine, EngineError, Setup, requests_for
from megatron_troll.rollout.sglang import transport
from megatron_troll.rollout.sglang.control import Control
from megatron_troll.types import Prompt, Rollout
from megatron_troll.weights.buckets import Allocate, TensorBucket, buckets
from tests.dist.generation_worker import opened
from tests.dist.layout_table import Sizes
from tests.sglang.model import PROMPTS, VOCAB, ends

# The accuracy of float32 sums in another order.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Job:
    """A trainer: its layout, the folder of its weights, where its runs go, and its `rollout` settings. It
    wants `samples` answers to each prompt, and the `top_k` likeliest tokens at each position."""

    sizes: Sizes
    folder: Path
    runs: Path
    sglang: dict[str, Any]
    sampling: dict[str, Any]
    name: str = "run"
    prompts: tuple[Prompt, ...] = PROMPTS
    samples: int = 4
    top_k: int = VOCAB

    @property
    def config(self) -> Config:
        policy = Model(path=str(self.folder), dtype="fp32")
        settings = {"engine": "sglang", "top_k": self.top_k, "sampling": self.sampling, "sglang": self.sglang}
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
    stops = ends(job.folder, model.shape.vocab)
    return rollout.build(Setup(job.config, model, job.folder, tokenizer, stops, job.prompts))


def generate(engine: Engine, version: int, samples: int) -> Drawn:
    """The answers of `version`, after a sync."""
    synced = engine.sync(version)
    sampling = engine.setup.rollout.sampling
    rollouts = engine.generate(requests_for(engine.setup.prompts, samples), sampling, version)
    return Drawn(rollouts, laws(engine.setup.model, rollouts, sampling), synced)


def laws(model: MegatronModel, rollouts: Sequence[Rollout], sampling: Sampling) -> list[np.ndarray]:
    groups, vocab, ones = model.groups, model.shape.vocab, [1.0] * len(rollouts)
    form = Form(vocab, tp_size=groups.tp.size, temperature=sampling.logprob_temperature)
    batches = [build(rollouts, ones, ones, [i], form) for i in range(len(rollouts))]
    head = Head(model, sampling.logprob_temperature)

    def read(i: int, hidden: Tensor) -> np.ndarray:
        return torch.cat(groups.tp.all_gather(head.log_probs(hidden)), -1)[:, :vocab].numpy()

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
    with opened(job.sizes, str(job.folder)) as model, closing(engine_of(job, model)) as engine:
        first = generate(engine, 1, job.samples)
        perturb(model)
        return [first, generate(engine, 2, job.samples)]


def draw_once(job: Job) -> Drawn:
    with opened(job.sizes, str(job.folder)) as model, closing(engine_of(job, model)) as engine:
        return generate(engine, 1, job.samples)


def draw_after_rest(job: Job) -> list[Drawn]:
    """The same version before and after the servers had no memory."""
    with opened(job.sizes, str(job.folder)) as model, closing(engine_of(job, model)) as engine:
        before = generate(engine, 1, job.samples)
        engine.rest()
        return [before, generate(engine, 1, job.samples)]


def draw_long(job: Job, under_way: Path) -> Drawn:
    """Many long answers; `under_way` is there from their beginning."""
    with opened(job.sizes, str(job.folder)) as model, closing(engine_of(job, model)) as engine:
        synced, sampling = engine.sync(1), Sampling(max_tokens=200)
        requests = requests_for(PROMPTS, 16)
        under_way.touch()
        rollouts = engine.generate(requests, sampling, 1)
        return Drawn(rollouts, laws(model, rollouts, sampling), synced)


def sync_error(job: Job) -> tuple[str, str]:
    """The kind of error that a sync ends with, and what it says."""
    with opened(job.sizes, str(job.folder)) as model, closing(engine_of(job, model)) as engine:
        return _error(engine)


def sync_without_session(job: Job) -> tuple[str, str]:
    async def not_opened(control: Control, url: str) -> None:
        pass

    with patch.object(Control, "open_update", not_opened):
        return sync_error(job)


def sync_without_name(job: Job) -> tuple[str, str]:
    async def not_named(control: Control, url: str, version: str) -> None:
        pass

    with patch.object(Control, "name_weights", not_named):
        return sync_error(job)


def sync_with_a_fault(job: Job) -> tuple[str, str]:
    """One family of weights arrives as zeros."""

    def faulty(
        tensors: Iterable[tuple[str, Tensor]], max_bytes: int, allocate: Allocate
    ) -> Iterator[TensorBucket]:
        for bucket in buckets(tensors, max_bytes, allocate):
            for piece in bucket.pieces:
                if "q_norm" in piece.name:
                    bucket.flat[piece.start : piece.end] = 0
            yield bucket

    with patch.object(transport, "buckets", faulty):
        return sync_error(job)


def sync_nan(job: Job) -> tuple[str, str]:
    with opened(job.sizes, str(job.folder)) as model, closing(engine_of(job, model)) as engine:
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.data.fill_(float("nan"))
        return _error(engine)


def _error(engine: Engine) -> tuple[str, str]:
    try:
        engine.sync(1)
    except EngineError as error:
        return type(error).__name__, str(error)
    raise AssertionError("the sync went well")


def assert_the_trainers(
    ranks: Sequence[Drawn], version: int, tolerance: float = TOLERANCE, top_k: int = VOCAB
) -> None:
    """The log-probs of the tokens, and those of the `top_k` likeliest at each position, are the trainer's."""
    trainers = next(rank.laws for rank in ranks if rank.laws)
    for drawn, law in zip(ranks[0].rollouts, trainers, strict=True):
        _assert_of_law(drawn, law, version, tolerance, top_k)


def _assert_of_law(drawn: Rollout, law: np.ndarray, version: int, tolerance: float, top_k: int) -> None:
    positions = np.arange(len(drawn.response_ids))
    assert drawn.versions.tolist() == [version] * len(positions)
    np.testing.assert_allclose(drawn.logp, law[positions, drawn.response_ids], atol=tolerance)
    assert drawn.topk is not None
    assert drawn.topk.ids.shape == (len(positions), top_k)
    served = np.take_along_axis(law, drawn.topk.ids.astype(np.int64), axis=1)
    np.testing.assert_allclose(drawn.topk.logp, served, atol=tolerance)
    # The trainer's own, in its order, but for ties within the tolerance.
    best = -np.sort(-law, axis=1)[:, :top_k]
    np.testing.assert_allclose(served, best, atol=2 * tolerance)
