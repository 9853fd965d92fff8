"""A pool of sampled responses with the full rows of a policy and its reference for every token."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_troll.config import ConfigError, Layout
from megatron_troll.launch.local import rank_environment
from megatron_troll.launch.ports import free_port
from megatron_troll.mcore import parallel
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import MegatronModel
from megatron_troll.mcore.schedule import infer
from megatron_troll.rollout.engine import requests_for
from megatron_troll.run.evaluation import EVALUATION_ROUND, open_engine
from megatron_troll.study.kl import TokenPool
from megatron_troll.task import Task
from megatron_troll.training.build import open_model
from megatron_troll.training.microbatches import MicroBatcher
from megatron_troll.types import MicroBatch


def draw_pool(task: Task) -> TokenPool:
    """Sample rollout.samples answers to each of rollout.prompts held-out prompts, and read them with
    models.policy and models.reference, in this process only. Holds 2 x N x V numbers in fp32 for the N
    sampled tokens. Raises ConfigError without a reference, and for a layout of several ranks."""
    config = task.config
    if config.models.reference is None or config.policy.layout != Layout():
        raise ConfigError(
            "study kl needs models.reference, and a policy on one rank: models.policy.layout={}"
        )
    os.environ.update(rank_environment(0, 1, free_port(), torch.get_num_threads()))
    groups = parallel.start(config.policy.layout, config.seed)
    try:
        policy = open_model(config.policy, task.shape, groups, config.seed, unwatched)
        prompts = task.prompts.held_out[: config.rollout.prompts]
        requests = requests_for(prompts, config.rollout.samples)
        engine = open_engine(task, policy)
        rollouts = engine.generate(requests, config.rollout.sampling, EVALUATION_ROUND)
        batches = MicroBatcher(config, policy, Layout()).once(rollouts, step=0)
        path = config.models.reference.path
        frozen = config.policy.model_copy(update={"path": path, "init": "pretrained"})
        reference = open_model(frozen, task.shape, groups, config.seed, unwatched)
        temperature = config.rollout.sampling.temperature
        rows = (full_rows(model, batches, temperature) for model in (policy, reference))
        return TokenPool(
            *rows,
            target=torch.cat([batch.target for batch in batches]).cpu(),
            response=torch.cat([torch.tensor(batch.rollouts)[batch.sequence.cpu()] for batch in batches]),
        )
    finally:
        parallel.stop()


def unwatched() -> None:
    """Ignore progress: this process has no watchdog."""


def full_rows(model: MegatronModel, batches: Sequence[MicroBatch], temperature: float) -> Tensor:
    """[N, V] log-probabilities of the batches' tokens, on the CPU."""
    head, size = Head(model, temperature), model.shape.vocab

    def read(i: int, hidden: Tensor) -> Tensor:
        return head.log_probs(hidden)[:, :size].cpu()

    return torch.cat(infer(model, batches, read))
