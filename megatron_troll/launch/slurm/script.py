"""The job script of a configuration and an allocation: a generated head, followed by train.sh."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import join, quote

from megatron_troll.config import Config, ConfigError, RunPaths, Serve
from megatron_troll.mcore.layout import check_world

BODY = Path(__file__).with_name("train.sh")


@dataclass(frozen=True)
class Allocation:
    """Resources to request from Slurm. One task runs on each GPU, or `tasks` per node if gpus is 0.

    nodes        number of nodes that train
    serve_nodes  number of additional nodes, whose GPUs run SGLang servers
    notice_s     seconds before the time limit at which the ranks are asked to save
    container    image for pyxis; None: run in the nodes' own environment
    mounts       SOURCE:TARGET mounts of the container, besides the working folder
    interface    network interface, the same name on every node; None: on each node, the one towards the first
    restarts     times a stopped run is requeued
    """

    nodes: int
    serve_nodes: int = 0
    gpus: int = 8
    tasks: int = 1
    cpus: int | None = None
    time: str = "24:00:00"
    partition: str | None = None
    account: str | None = None
    notice_s: int = 600
    container: str | None = None
    mounts: Sequence[str] = ()
    python: str = ".venv/bin/python"
    interface: str | None = None
    restarts: int = 100

    @property
    def world(self) -> int:
        """Number of ranks that train."""
        return self.nodes * (self.gpus or self.tasks)

    @property
    def all_nodes(self) -> int:
        return self.nodes + self.serve_nodes


def check_options(allocation: Allocation) -> None:
    """Raises ConfigError for options that sbatch would accept with another meaning."""
    limit = seconds_of(allocation.time)
    if limit is not None and allocation.notice_s >= limit:
        raise ConfigError(
            f"--notice-s {allocation.notice_s}: the ranks would be asked to save before they start; --time "
            f"{allocation.time} is {limit} s: lower --notice-s, or raise --time"
        )
    for mount in allocation.mounts:
        if allocation.container is None or ":" not in mount:
            raise ConfigError(f"--mounts {mount}: SOURCE:TARGET, of a --container")


def seconds_of(time: str) -> int | None:
    """Parse a time limit as sbatch does: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. None for no limit (0,
    UNLIMITED) and for text that sbatch refuses."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        return None
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    else:
        hours, minutes, seconds = (0, *parts, 0)[:3] if len(parts) < 3 else parts
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None


def check(config: Config, allocation: Allocation) -> None:
    """Raises ConfigError if the training ranks are not a multiple of what a model's layout needs."""
    models = config.models
    for name, model in (("policy", models.policy), ("critic", models.critic), ("rollout", models.rollout)):
        if model is None:
            continue
        try:
            check_world(model.layout, allocation.world)
        except ConfigError as error:
            ranks = allocation.gpus or allocation.tasks
            raise ConfigError(f"{allocation.nodes} nodes of {ranks} ranks: models.{name}: {error}") from error


def check_servers(config: Config, allocation: Allocation) -> None:
    """Raises ConfigError if the run needs servers and gets none, if it would not use them, if they have no
    API key file, or if a node has too few GPUs for them."""
    sglang, asked = config.rollout.sglang, allocation.serve_nodes
    if asked and config.rollout.engine != "sglang":
        raise ConfigError(f"--serve-nodes {asked}: rollout.engine={config.rollout.engine} uses no servers")
    if asked and (sglang.colocated or not config.own_servers):
        raise ConfigError(f"--serve-nodes {asked}: rollout.sglang already says where the servers are")
    if not config.own_servers:
        return
    if not asked and not sglang.colocated:
        raise ConfigError(
            "rollout.engine=sglang: nobody serves; give --serve-nodes, or set rollout.sglang.colocated, "
            "servers or router"
        )
    if sglang.api_key_file is None:
        raise ConfigError(
            "rollout.sglang.api_key_file: missing; servers of a job are on the network, and need a key"
        )
    if allocation.gpus:
        check_gpus(config.serve, allocation.gpus)


def check_gpus(serve: Serve, gpus: int) -> None:
    """Raises ConfigError if the servers of one node need more GPUs than it has."""
    wanted = serve.servers * serve.tp
    if wanted > gpus:
        fewer = f"set serve.servers to at most {gpus // serve.tp}, or " if serve.tp <= gpus else ""
        raise ConfigError(
            f"serve.servers={serve.servers} x serve.tp={serve.tp} = {wanted} GPUs of each node that serves, "
            f"which has {gpus} (--gpus): {fewer}lower serve.tp"
        )


def check_memory(config: Config, allocation: Allocation) -> str:
    """The plan's verdict on the allocation's GPUs; "" if it has none. Raises ConfigError if the run does not
    fit, or cannot be planned."""
    # Scripts are also written on machines without megatron-core and transformers.
    from megatron_troll.launch.plan.build import plan
    from megatron_troll.launch.plan.table import verdict

    if not allocation.gpus:
        return ""
    planned = plan(config, allocation.world)
    if not planned.fits:
        raise ConfigError(f"{allocation.nodes} nodes of {allocation.gpus} GPUs: {verdict(planned)}")
    return verdict(planned)


def write(config: Config, path: str, overrides: Sequence[str], allocation: Allocation) -> str:
    """The whole script that runs `mtroll train PATH OVERRIDES`. Raises ConfigError."""
    head = ["#!/usr/bin/env bash", *(f"#SBATCH {option}" for option in options(config.name, allocation))]
    return "\n".join([*head, "", body(config, path, overrides, allocation)])


def body(config: Config, path: str, overrides: Sequence[str], allocation: Allocation) -> str:
    """Commands of the batch shell, run in the folder it was submitted from. Raises ConfigError."""
    check_options(allocation)
    check(config, allocation)
    check_servers(config, allocation)
    network = [] if allocation.interface is None else ["--interface", allocation.interface]
    variables = {
        "run": quote(str(RunPaths.of(config).root)),
        "python": quote(allocation.python),
        "command": f"({join(['train', path, *overrides, 'resume=true'])})",
        "container": f"({pyxis(allocation)})",
        "image": quote(file_of(allocation.container)),
        "network": f"({join(network)})",
        "first": str(allocation.serve_nodes),
        "nodes": str(allocation.nodes),
        "gpus": str(allocation.gpus),
        "ranks": str(allocation.world),
        "serving": f"({join(serving(config, allocation))})",
        "restarts": str(allocation.restarts),
    }
    return "\n".join([*(f"{name}={value}" for name, value in variables.items()), BODY.read_text()])


def options(name: str, allocation: Allocation) -> list[str]:
    """sbatch's options, one per line of the script. Raises ConfigError."""
    asked: dict[str, str | int | None] = {
        "job-name": name,
        "nodes": allocation.all_nodes,
        "ntasks-per-node": allocation.gpus or allocation.tasks,
        "gpus-per-node": allocation.gpus or None,
        "cpus-per-task": allocation.cpus,
        "time": allocation.time,
        "partition": allocation.partition,
        "account": allocation.account,
        "signal": f"B:USR1@{allocation.notice_s}",
        "open-mode": "append",
        "output": "slurm-%j.log",
    }
    for option, value in asked.items():
        if not str(value).isprintable():
            raise ConfigError(f"{option}: {value!r} has a character that an #SBATCH line cannot hold")
    given = [f"--{name}={quote(str(value))}" for name, value in asked.items() if value is not None]
    return [*given, "--requeue"]


def serving(config: Config, allocation: Allocation) -> list[str]:
    """srun's options for a job's own servers, on its first nodes or beside the ranks; [] without servers."""
    if allocation.serve_nodes:
        nodes, shared = allocation.serve_nodes, []
    elif config.own_servers and config.rollout.sglang.colocated:
        nodes, shared = allocation.nodes, ["--overlap"]
    else:
        return []
    return [*shared, "--relative=0", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]


def file_of(container: str | None) -> str:
    """The image's path if it is a file (.sqsh); "" for an image of a registry."""
    return container if container and container.endswith(".sqsh") else ""


def pyxis(allocation: Allocation) -> str:
    """srun's options for a container that mounts the working folder, as words of bash; "" without one."""
    if allocation.container is None:
        return ""
    mounts = re.sub(r'([\\"$`])', r"\\\1", "".join(f",{mount}" for mount in allocation.mounts))
    return (
        f"--container-image={quote(allocation.container)} "
        f'--container-mounts="$PWD:$PWD{mounts}" '
        '--container-workdir="$PWD" --no-container-mount-home'
    )
