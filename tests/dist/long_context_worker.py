"""One long response through forward, LM head and backward, and the memory that it took."""

from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor

from megatron_troll.batching.build import Form, build
from megatron_troll.config import Model
from megatron_troll.mcore import model as mcore
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.schedule import accumulate, infer
from megatron_troll.mcore.shape import shape_of
from megatron_troll.types import HeadRequest, Message, Prompt, Rollout
from megatron_troll.weights.load import load
from megatron_troll.weights.source import RandomSource
from tests.dist.parameters import main_gradient, parameters_by_name
from tests.dist.tiny import started


@dataclass(frozen=True)
class Long:
    """loss: this rank's; positions: those that this rank read; grad_norm: of this rank's parameters;
    peak: bytes of resident memory beyond what was held before, at most."""

    loss: float
    positions: int
    grad_norm: float
    peak: int


def run_long(config: Model, sizes: dict, tokens: int) -> Long:
    """The mean log-prob of `tokens` random tokens after a prompt of one, and its gradients."""
    shape = shape_of(sizes)
    with started(config.layout) as groups:
        model = mcore.build(config, shape, groups)
        load(model, RandomSource(shape, 0))
        form = Form(vocab=shape.vocab, cp_rank=groups.cp.rank, cp_size=groups.cp.size)
        batch = build([response(tokens, shape.vocab)], [1.0], [1.0 / tokens], [0], form)
        head = Head(model)

        def loss(i: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
            logp = head.read(hidden, batch.target, HeadRequest(logp=True)).logp
            assert logp is not None
            value = -(batch.weight * logp).sum()
            return value, value.detach()

        before = reset_peak()
        (value,) = accumulate(model, [batch], loss)
        peak = resident("VmHWM") - before
        norms = [main_gradient(parameter).norm() for parameter in parameters_by_name(model).values()]
        return Long(float(value), len(batch.index), float(torch.stack(norms).norm()), peak)


def response(tokens: int, vocab: int) -> Rollout:
    ids = np.random.default_rng(0).integers(0, vocab, tokens)
    return Rollout(
        prompt=Prompt("p", (Message("user", "?"),), answer=""),
        group=0,
        sample=0,
        prompt_ids=np.zeros(1, dtype=np.int32),
        response_ids=ids,
        marks=np.ones(tokens, np.int32),
        logp=np.zeros(tokens, np.float32),
        key=0,
        topk=None,
        text="",
        finish="stop",
        temperature=1.0,
    )


def reset_peak() -> int:
    """Let the kernel forget this process's highest memory; what it holds now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def rotations(config: Model, sizes: dict, responses: int) -> int:
    """How often Megatron turns queries or keys in the forward of one micro-batch with so many responses."""
    shape = shape_of(sizes)
    with (
        started(config.layout) as groups,
        mock.patch.object(
            rope_utils, "_apply_rotary_pos_emb_bshd", wraps=rope_utils._apply_rotary_pos_emb_bshd
        ) as turned,
    ):
        model = mcore.build(config, shape, groups)
        load(model, RandomSource(shape, 0))
        form = Form(vocab=shape.vocab, cp_rank=groups.cp.rank, cp_size=groups.cp.size)
        rollouts = [response(5, shape.vocab)] * responses
        batch = build(rollouts, [1.0] * responses, [1.0] * responses, list(range(responses)), form)
        infer(model, [batch], lambda i, hidden: hidden)
        return turned.call_count
