"""The requirements of a configuration on the nodes it runs on."""

import os
from collections.abc import Mapping

import torch

from megatron_troll.config import Config, ConfigError, Model
from megatron_troll.launch.plan.build import GIB, plan
from megatron_troll.launch.plan.servers import server_share
from megatron_troll.launch.plan.states import MASTER, MOMENTS, WIDTHS
from megatron_troll.mcore.shape import read_shape
from megatron_troll.preflight.run import Needs
from megatron_troll.preflight.serving import servers_of
from megatron_troll.system import address_towards
from megatron_troll.weights.families import table_of
from megatron_troll.weights.table import parameters_of


def needs_of(config: Config, serve_nodes: int = 0, environment: Mapping[str, str] = os.environ) -> Needs:
    """The needs of this node, if the first `serve_nodes` nodes serve and the others train. Reads config.json
    of each model. Under Slurm a node has the GPUs of its allocation, otherwise those that torch sees. Raises
    ConfigError or OSError if a model cannot be read or planned."""
    asked = environment.get("SLURM_GPUS_ON_NODE")
    gpus = torch.cuda.device_count() if asked is None else int(asked)
    rank, nodes = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    if serve_nodes and not config.own_servers:
        raise ConfigError(f"--serve-nodes {serve_nodes}: the configuration uses no servers of its own")
    trains = rank >= serve_nodes
    serves = config.own_servers and (config.rollout.sglang.colocated or not trains)
    wanted = gpus
    if serves and (gpus or config.serve.device == "cuda"):
        wanted = max(gpus, config.serve.servers * config.serve.tp)
    if not gpus:
        memory = 0
    elif trains:
        memory = gpu_bytes(config, (nodes - serve_nodes) * gpus)
    else:
        memory = round(server_share(config) * config.launch.device_gib * GIB)
    return Needs(
        config=config,
        disk_bytes=disk_bytes(config),
        gpus=wanted,
        gpu_bytes=memory,
        servers=servers_of(config, host_of(config, environment)) if serves else None,
    )


def host_of(config: Config, environment: Mapping[str, str]) -> str:
    """The address on which this node's servers listen: in a job, the one towards the other nodes."""
    if "SLURM_LAUNCH_NODE_IPADDR" in environment:
        return address_towards(environment["MASTER_ADDR"])
    return config.serve.host


def gpu_bytes(config: Config, ranks: int) -> int:
    """Planned bytes of the rank that holds the most, plus the reserve for CUDA and NCCL."""
    return plan(config, ranks).worst.total + round(config.launch.reserve_gib * GIB)


def disk_bytes(config: Config) -> int:
    """Bytes of the checkpoints kept at once, including one that is being written, and of the export."""
    models = config.models
    trained = [model for model in (models.policy, models.critic, models.rollout) if model is not None]
    one = sum(parameters(model) * (WIDTHS[model.dtype] + MASTER + MOMENTS) for model in trained)
    kept = config.checkpoint.keep_last + 1 + config.checkpoint.keep_best
    exported = [model for model in (models.policy, models.rollout) if model and config.checkpoint.export]
    return kept * one + sum(parameters(model) * WIDTHS[model.dtype] for model in exported)


def parameters(model: Model) -> int:
    return parameters_of(table_of(read_shape(model.path)))
