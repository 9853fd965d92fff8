"""Tokens per second and MFU of a step."""

import math
from collections.abc import Sequence

import numpy as np
import torch

from megatron_troll.config import Config
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.observe.phases import ModelCost, mfu, peak_tflops
from megatron_troll.types import Rollout
from megatron_troll.weights.families import table_of

EMBEDDING = ("embedding.word_embeddings.weight",)


def speed(
    config: Config,
    shape: ModelShape,
    rollouts: Sequence[Rollout],
    seconds: float,
    devices: int,
    spared: float = 0.0,
) -> dict[str, float]:
    """`tokens_per_s` over prompt and response tokens; `mfu` too, for bf16, if the device's peak is known
    (from its name or observe.peak_tflops) and the policy itself generates. Generation counts as one forward,
    the pass that reads the old policy as one of all updates but the first. `spared`: share of the repeated
    prompt tokens that training did not read again (the metric spared_tokens)."""
    lengths = np.array([len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts])
    tokens = int(lengths.sum())
    figures = {"tokens_per_s": tokens / seconds}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = peak_tflops(name, config.observe.peak_tflops)
    if peak is not None and config.policy.dtype == "bf16" and config.models.rollout is None:
        train = config.train
        trained = train.epochs * (tokens - spared * repeated_tokens(rollouts))
        old = trained * (train.updates - 1) / train.updates if config.objective.old == "trainer" else 0.0
        context = float((lengths**2).sum() / (2 * tokens))
        flops = cost_of(shape).flops(tokens + old, trained, context)
        figures["mfu"] = mfu(flops, seconds, devices, peak)
    return figures


def repeated_tokens(rollouts: Sequence[Rollout]) -> int:
    """Prompt tokens that reading every response on its own repeats."""
    prompts: dict[int, int] = {}
    repeated = 0
    for rollout in rollouts:
        repeated += len(rollout.prompt_ids) if rollout.group in prompts else 0
        prompts[rollout.group] = len(rollout.prompt_ids)
    return repeated


def cost_of(shape: ModelShape) -> ModelCost:
    """Parameters that one token passes through, head included, embedding and vectors (norms) excluded. Linear
    attention reads, corrects and reads again a matrix per head, which counts as three times its size."""
    table, linear = table_of(shape), shape.linear
    parameters = sum(
        math.prod(tensor.shape)
        * (shape.experts_per_token if entry.per_expert else 1)
        * len(table.layers_of(entry))
        for entry in table.entries
        for tensor in entry.hf
        if len(tensor.shape) > 1 and entry.megatron != EMBEDDING
    )
    full = shape.layer_types.count("full_attention")
    if linear is not None:
        states = 3 * linear.value_heads * linear.key_dim * linear.value_dim
        parameters += (shape.layers - full) * states
    return ModelCost(parameters, full * shape.heads * shape.head_dim)
