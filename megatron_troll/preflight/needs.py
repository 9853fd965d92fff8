"""What a configuration needs of the nodes it runs on."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from megatron_troll.config.tree import Config, Model
from megatron_troll.launch.plan.build import GIB, plan
from megatron_troll.mcore.shape import read_shape
from megatron_troll.preflight.run import Needs
from megatron_troll.weights.families import table_of
from megatron_troll.weights.table import parameters_of

# The fp32 copy of a parameter and Adam's two moments.
OPTIMIZER_BYTES = 12
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}


def needs_of(config: Config, environment: Mapping[str, str] = os.environ) -> Needs:
    """Reads config.json of each model. Under Slurm a node has the GPUs of its allocation, otherwise those
    that torch sees. Raises ConfigError, ValueError or OSError where a model cannot be read or planned."""
    asked = environment.get("SLURM_GPUS_ON_NODE")
    gpus = torch.cuda.device_count() if asked is None else int(asked)
    nodes = int(environment.get("WORLD_SIZE", "1"))
    return Needs(
        Path(config.runs) / config.name,
        disk_bytes(config),
        gpus,
        gpu_bytes(config, nodes * gpus) if gpus else 0,
    )


def gpu_bytes(config: Config, ranks: int) -> int:
    """Of the rank that holds the most, with what is left to CUDA and NCCL."""
    return plan(config, ranks).worst.total + round(config.launch.reserve_gib * GIB)


def disk_bytes(config: Config) -> int:
    """Of the checkpoints that are kept at once, one that is being written included, and of the export."""
    models = config.models
    trained = [model for model in (models.policy, models.critic, models.rollout) if model is not None]
    one = sum(parameters(model) * (WEIGHT_BYTES[model.dtype] + OPTIMIZER_BYTES) for model in trained)
    kept = config.checkpoint.keep_last + 1 + config.checkpoint.keep_best
    exported = [model for model in (models.policy, models.rollout) if model and config.checkpoint.export]
    return kept * one + sum(parameters(model) * WEIGHT_BYTES[model.dtype] for model in exported)


def parameters(model: Model) -> int:
    return parameters_of(table_of(read_shape(model.path)))
