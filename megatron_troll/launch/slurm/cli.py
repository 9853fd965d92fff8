"""`mtroll launch`: write a job script, and submit it when asked to."""

import argparse
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_troll.config import ConfigError
from megatron_troll.observe.opened import load_opened
from megatron_troll.system import FAILED, REFUSED, write_atomic

if TYPE_CHECKING:
    from megatron_troll.launch.slurm.script import Allocation


def add_to(commands: "argparse._SubParsersAction") -> None:
    """Add the `launch` command and its options."""
    about = "write a job script for `mtroll train` on a cluster"
    parser = commands.add_parser("launch", help=about, description=about)
    parser.add_argument("config", help="YAML file or run folder; the job reads it by the same path")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--slurm", action="store_true", required=True, help="write a Slurm script")
    parser.add_argument("--output", default=None, help="path of the script; default: NAME.sbatch")
    parser.add_argument("--submit", action="store_true", help="submit the script with sbatch")
    add_allocation(parser)
    parser.set_defaults(run=run)


def add_allocation(parser: argparse.ArgumentParser) -> None:
    """Add an option for each field of Allocation."""
    asked = parser.add_argument_group("allocation")
    asked.add_argument("--nodes", type=positive, required=True, help="nodes that train")
    asked.add_argument(
        "--serve-nodes", type=natural, default=0, help="additional nodes that serve (default 0)"
    )
    asked.add_argument("--gpus", type=natural, default=8, help="GPUs per node, one rank on each (default 8)")
    asked.add_argument("--tasks", type=positive, default=1, help="ranks per node if --gpus is 0 (default 1)")
    asked.add_argument("--cpus", type=positive, default=None, help="CPUs per rank; default: the cluster's")
    asked.add_argument("--time", default="24:00:00", help="time limit (default 24:00:00)")
    asked.add_argument("--partition", default=None)
    asked.add_argument("--account", default=None)
    asked.add_argument(
        "--notice-s",
        type=positive,
        default=600,
        help="seconds before the limit at which the run saves and goes back into the queue (default 600)",
    )
    asked.add_argument(
        "--container", default=None, metavar="IMAGE", help="container image to run in, through pyxis"
    )
    asked.add_argument(
        "--mounts",
        action="append",
        default=[],
        metavar="SOURCE:TARGET",
        help="container mount; may be repeated",
    )
    asked.add_argument(
        "--python", default=".venv/bin/python", help="Python interpreter on the nodes, or in the container"
    )
    asked.add_argument("--interface", default=None, help="network interface; default: chosen on each node")
    asked.add_argument(
        "--restarts", type=natural, default=100, help="times the job may be requeued (default 100)"
    )


def natural(text: str) -> int:
    """Parse an integer >= 0. Raises ValueError, as argparse expects."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def positive(text: str) -> int:
    """Parse an integer >= 1. Raises ValueError."""
    if natural(text) == 0:
        raise ValueError(text)
    return int(text)


def allocation_of(arguments: Namespace) -> "Allocation":
    """Build the Allocation from the options of `add_allocation`."""
    from megatron_troll.launch.slurm.script import Allocation

    given: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(Allocation)}
    given["mounts"] = tuple(arguments.mounts)
    return Allocation(**given)


def run(arguments: Namespace) -> int:
    from megatron_troll.launch.slurm.script import check_memory, write

    try:
        config, allocation = load_opened(arguments.config, arguments.overrides), allocation_of(arguments)
        script = write(config, arguments.config, arguments.overrides, allocation)
        said = check_memory(config, allocation)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    path = Path(arguments.output or f"{config.name}.sbatch")
    write_atomic(path, script)
    if arguments.submit:
        return submit(path)
    sys.stdout.write(
        "".join(f"{line}\n" for line in (said, f"wrote {path}; submit it: sbatch {path}") if line)
    )
    return 0


def submit(path: Path) -> int:
    """Submit the script; sbatch itself prints the result. Return 0, FAILED, or REFUSED without sbatch."""
    try:
        return FAILED if subprocess.run(["sbatch", str(path)]).returncode else 0
    except FileNotFoundError:
        sys.stderr.write(f"sbatch is not on this machine: submit {path} from a login node\n")
        return REFUSED
