"""Tokens per second and MFU of a step."""

from collections.abc import Sequence

import numpy as np
import torch

from megatron_troll.config.tree import Config
from megatron_troll.mcore.shape import ModelShape
from megatron_troll.observe.phases import ModelCost, mfu, peak_tflops
from megatron_troll.types import Rollout


def speed(
    config: Config, shape: ModelShape, rollouts: Sequence[Rollout], seconds: float, devices: int
) -> dict[str, float]:
    """`tokens_per_s` over prompt and answer tokens; `mfu` too for bf16 where the device's peak is known (its
    name, or observe.peak_tflops). Generation and the old-policy pass count as one forward each."""
    lengths = np.array([len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts])
    tokens = int(lengths.sum())
    figures = {"tokens_per_s": tokens / seconds}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    peak = peak_tflops(name, config.observe.peak_tflops)
    if peak is not None and config.policy.dtype == "bf16":
        forwards = 2 if config.objective.old == "trainer" else 1
        context = float((lengths**2).sum() / (2 * tokens))
        flops = cost_of(shape).flops(forwards * tokens, config.train.epochs * tokens, context)
        figures["mfu"] = mfu(flops, seconds, devices, peak)
    return figures


def cost_of(shape: ModelShape) -> ModelCost:
    """Parameters that one token passes through, head included, embedding and norms excluded."""
    attention = shape.hidden * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    dense = 3 * shape.hidden * shape.ffn
    experts = shape.hidden * (3 * shape.experts_per_token * shape.expert_ffn + shape.experts)
    layer = attention + (experts if shape.experts else dense)
    parameters = shape.layers * layer + shape.hidden * shape.vocab
    return ModelCost(parameters, shape.layers * shape.heads * shape.head_dim)
