"""`mtroll train` as a nemo-run task: one recipe, and the executors that run it."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from shlex import join, quote

import nemo_run as run
from nemo_run.config import RUNDIR_NAME, get_nemorun_home

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import load
from megatron_troll.launch.slurm.script import Allocation, body, check

# nemo-run's batch script calls `srun --output LOG ... bash SCRIPT`. The script is a job body: it traps the
# signals that come before a time limit or a preemption, which reach the batch shell alone, and calls srun
# itself. So the batch shell becomes the script, and LOG is what the script says.
IN_THE_BATCH_SHELL = 'srun() { exec "${@: -2}" >>"${2//%j/$SLURM_JOB_ID}" 2>&1; }'


@dataclass(frozen=True)
class Recipe:
    """A run that has been checked. `path` and `overrides` are mtroll's, read in `folder`, which every node
    and container sees under the same name."""

    config: Config
    path: str
    overrides: tuple[str, ...]
    allocation: Allocation
    folder: Path

    @property
    def name(self) -> str:
        """The run's name as nemo-run can bear it: its scripts do not quote paths."""
        return re.sub(r"[^\w.-]+", "-", self.config.name)


@dataclass(frozen=True)
class Job:
    """What an experiment is given."""

    task: run.Script
    executor: run.Executor


def recipe(path: str, overrides: Sequence[str], allocation: Allocation) -> Recipe:
    """`mtroll train PATH OVERRIDES resume=true` in the current folder. Raises ConfigError."""
    config = load(path, overrides)
    check(config, allocation)
    return Recipe(config, path, tuple(overrides), allocation, Path.cwd())


def local(recipe: Recipe) -> Job:
    """Ranks on this machine. Raises ConfigError."""
    _takes(recipe.allocation, "nodes", "gpus", "tasks", "python")
    return Job(_on_one_node(recipe), run.LocalExecutor())


def docker(recipe: Recipe) -> Job:
    """Ranks in one container on this machine, as the user who asks for it. Raises ConfigError."""
    allocation = recipe.allocation
    _takes(allocation, "nodes", "gpus", "tasks", "python", "container", "mounts")
    if allocation.container is None:
        raise ConfigError("--container is missing: the image that has `mtroll` in it")
    executor = run.DockerExecutor(
        container_image=allocation.container,
        num_gpus=allocation.gpus or None,
        ipc_mode="host",
        volumes=[f"{recipe.folder}:{recipe.folder}", *allocation.mounts],
        packager=run.Packager(),
        additional_kwargs={"user": f"{os.getuid()}:{os.getgid()}"},
    )
    return Job(_on_one_node(recipe), executor)


def slurm(recipe: Recipe) -> Job:
    """The job of `mtroll launch --slurm`, submitted from a node of the cluster. Raises ConfigError."""
    allocation = recipe.allocation
    steps = body(recipe.config, recipe.path, recipe.overrides, allocation)
    executor = run.SlurmExecutor(
        account=allocation.account,  # pyright: ignore[reportArgumentType]  # a cluster without accounts
        partition=allocation.partition,
        job_name_prefix="mtroll.",
        nodes=allocation.all_nodes,
        ntasks_per_node=allocation.gpus or allocation.tasks,
        gpus_per_node=allocation.gpus or None,
        cpus_per_task=allocation.cpus,
        time=allocation.time,
        signal=f"B:USR1@{allocation.notice_s}",
        setup_lines=IN_THE_BATCH_SHELL,
        packager=run.Packager(),
        poll_estimated_start_time=False,
    )
    return Job(_script(recipe, steps), executor)


EXECUTORS: dict[str, Callable[[Recipe], Job]] = {"local": local, "slurm": slurm, "docker": docker}


def _takes(allocation: Allocation, *names: str) -> None:
    """Raises ConfigError where another field is given."""
    for field in fields(allocation):
        if field.name not in names and getattr(allocation, field.name) != field.default:
            raise ConfigError(f"--{field.name.replace('_', '-')} means nothing to this executor")


def _on_one_node(recipe: Recipe) -> run.Script:
    allocation = recipe.allocation
    if allocation.nodes > 1:
        raise ConfigError(f"--nodes {allocation.nodes}: this executor starts ranks on one node")
    ranks = f"launch.ranks={allocation.world}"
    words = [allocation.python, "-P", "-m", "megatron_troll.cli", "train", recipe.path, *recipe.overrides]
    # exec: what nemo-run signals is the command, which saves and stops.
    return _script(recipe, f"exec {join([*words, ranks, 'resume=true'])}\n")


def _script(recipe: Recipe, text: str) -> run.Script:
    inline = f"cd {quote(str(recipe.folder))} || exit\n{text}"
    if f"/{RUNDIR_NAME}" in inline:
        raise ConfigError(f"a path holds /{RUNDIR_NAME}, which nemo-run replaces in scripts: rename it")
    home = get_nemorun_home()
    if not re.fullmatch(r"[\w./-]+", home):
        raise ConfigError(f"NEMORUN_HOME is {home!r}, which nemo-run's scripts do not quote: use another")
    return run.Script(inline=inline)
