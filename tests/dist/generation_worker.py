"""What a rank does for test_generation: generate each case, and read the same tokens by a full forward."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_troll import rollout
from megatron_troll.batching.build import Form
from megatron_troll.batching.build import build as build_batch
from megatron_troll.config import Config, Layout, Model, Models, RolloutConfig, Sampling
from megatron_troll.data.demo_model import END, character_tokenizer
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel, build
from megatron_troll.mcore.schedule import infer
from megatron_troll.mcore.shape import read_shape
from megatron_troll.parallel.groups import Groups
from megatron_troll.rollout.engine import Engine, Request, Setup
from megatron_troll.rollout.records import share_records
from megatron_troll.types import HeadRequest, MicroBatch, Prompt, Rollout, Support
from megatron_troll.weights.load import load
from megatron_troll.weights.source import FolderSource
from tests.dist.layout_table import Sizes, formed_groups
from tests.dist.tiny import MOE, started

TOKENIZER = character_tokenizer()
VOCAB = len(TOKENIZER)
CONFIG = MOE | {"vocab_size": VOCAB}
STOPS = tuple(TOKENIZER.convert_tokens_to_ids([END, "7", "k"]))
TOP_K = 6
SEED = 3


@dataclass(frozen=True)
class Case:
    """One call of the engine. `order` are places in `requests()`."""

    sampling: Sampling
    config: dict[str, Any] = field(default_factory=dict)
    order: tuple[int, ...] = tuple(range(10))
    round: int = 1
    seed: int = SEED


@dataclass(frozen=True)
class Reading:
    """A full forward of one response: logp [T] of its tokens, topk_ids and topk_logp [T, K]."""

    logp: np.ndarray
    topk_ids: np.ndarray
    topk_logp: np.ndarray


@dataclass(frozen=True)
class Generated:
    """One rank's groups and number of chunks, its rollouts of each case, and by name the full readings of
    those that it forwards."""

    groups: Sizes
    chunks: int
    rollouts: dict[str, list[Rollout]]
    readings: dict[str, dict[str, Reading]]


def requests() -> list[Request]:
    """Two samples of five prompts, 1 to 11 tokens long."""
    generator = np.random.default_rng(5)
    prompts = [generator.integers(5, VOCAB, length) for length in (4, 11, 1, 7, 4)]
    return [
        Request(Prompt(f"p{group}", (), ""), group, sample, ids)
        for group, ids in enumerate(prompts)
        for sample in range(2)
    ]


@contextmanager
def opened(sizes: Sizes, folder: str, dtype: Any = "fp32") -> Iterator[MegatronModel]:
    """The model of `folder` on this layout, as a trainer has it."""
    layout = Layout(**sizes)
    with started(layout) as groups:
        model = build(Model(path=folder, dtype=dtype, layout=layout), read_shape(folder), groups)
        load(model, FolderSource(folder))
        model.train()
        yield model


def engine(model: MegatronModel, case: Case) -> Engine:
    config = Config(
        name="run",
        seed=case.seed,
        models=Models(policy=Model(path="unused")),
        rollout=RolloutConfig(**{"top_k": TOP_K} | case.config),
    )
    return rollout.build(Setup(config, model, Path(config.policy.path), TOKENIZER, STOPS))


def generate(model: MegatronModel, case: Case) -> list[Rollout]:
    chosen = [requests()[i] for i in case.order]
    drawing = engine(model, case)
    drawing.sync(case.round + 1)
    rollouts = drawing.generate(chosen, case.sampling, case.round)
    return share_records(rollouts, range(len(rollouts)), model.groups)


def generate_cases(sizes: Sizes, folder: str, cases: dict[str, Case], dtype: str = "fp32") -> Generated:
    with opened(sizes, folder, dtype) as model:
        rollouts = {name: generate(model, case) for name, case in cases.items()}
        readings = {name: read_fully(model, rollouts[name], case.sampling) for name, case in cases.items()}
        return Generated(formed_groups(model.groups), len(model.chunks), rollouts, readings)


def read_fully(model: MegatronModel, rollouts: Sequence[Rollout], sampling: Sampling) -> dict[str, Reading]:
    """This data-parallel rank's share of the rollouts, packed; nothing off the last stage."""
    head = Head(model, sampling.logprob_temperature)
    reads = HeadRequest(logp=True, topk=Support("own", TOP_K, 0.0))
    batches = packed(rollouts, model.groups, sampling)
    readings: dict[str, Reading] = {}

    def read(i: int, hidden: Tensor) -> None:
        seen = head.read(hidden, batches[i].target, reads)
        assert seen.logp is not None
        assert seen.topk is not None
        assert seen.topk.lse is not None
        topk_logp = (seen.topk.logits - seen.topk.lse[:, None])[:, :TOP_K]
        for s, index in enumerate(batches[i].rollouts):
            rows = batches[i].sequence == s
            columns = (seen.logp, seen.topk.ids[:, :TOP_K], topk_logp)
            readings[rollouts[index].name] = Reading(*(column[rows].numpy() for column in columns))

    model.train(False)
    infer(model, batches, read)
    model.train()
    return readings


WHOLE = Sampling()


def packed(rollouts: Sequence[Rollout], groups: Groups, sampling: Sampling = WHOLE) -> list[MicroBatch]:
    """This data-parallel rank's share, in two micro-batches."""
    form = Form(VOCAB, tp_size=groups.tp.size, temperature=sampling.logprob_temperature)
    ones = [1.0] * len(rollouts)
    mine = range(groups.dp.rank, len(rollouts), groups.dp.size)
    return [build_batch(rollouts, ones, ones, chosen, form) for chosen in (mine[::2], mine[1::2])]


def state(model: MegatronModel) -> dict[str, Any]:
    """Everything that generation switches, or could disturb."""
    modules = [(name, m) for chunk in model.chunks for name, m in chunk.named_modules()]
    watched = ("training", "sequence_parallel", "reduce_scatter_embeddings", "stored")
    return {
        "switches": [(name, a, getattr(m, a)) for name, m in modules for a in watched if hasattr(m, a)],
        "config": model.config.sequence_parallel,
        "grad": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
    }
