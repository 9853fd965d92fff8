"""`mtroll launch`: write a job script, and submit it when asked to."""

import argparse
import subprocess
import sys
from argparse import Namespace
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_troll.config import ConfigError
from megatron_troll.config.load import load
from megatron_troll.system import write_atomic

if TYPE_CHECKING:
    from megatron_troll.launch.slurm.script import Allocation

FAILED, REFUSED = 1, 2


def add_to(commands: "argparse._SubParsersAction") -> None:
    """The command's own options."""
    about = "write a job script for `mtroll train` on a cluster"
    parser = commands.add_parser("launch", help=about, description=about)
    parser.add_argument("config", help="YAML file, as the job will read it")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--slurm", action="store_true", required=True, help="the kind of cluster")
    parser.add_argument("--output", default=None, help="the script; default: NAME.sbatch")
    parser.add_argument("--submit", action="store_true", help="hand it to sbatch; else nothing is submitted")
    add_allocation(parser)
    parser.set_defaults(run=run)


def add_allocation(parser: argparse.ArgumentParser) -> None:
    """An option for each field of an Allocation."""
    asked = parser.add_argument_group("allocation")
    asked.add_argument("--nodes", type=positive, required=True, help="that train")
    asked.add_argument("--serve-nodes", type=natural, default=0, help="more nodes, which serve (default 0)")
    asked.add_argument("--gpus", type=natural, default=8, help="per node, a rank each (default 8)")
    asked.add_argument(
        "--tasks", type=positive, default=1, help="ranks per node where --gpus is 0 (default 1)"
    )
    asked.add_argument("--cpus", type=positive, default=None, help="per rank; default: the cluster's")
    asked.add_argument("--time", default="24:00:00", help="limit (default 24:00:00)")
    asked.add_argument("--partition", default=None)
    asked.add_argument("--account", default=None)
    asked.add_argument(
        "--notice-s",
        type=positive,
        default=600,
        help="seconds before the limit at which the run saves and goes back into the queue (default 600)",
    )
    asked.add_argument("--container", default=None, metavar="IMAGE", help="run in it, by pyxis")
    asked.add_argument(
        "--mounts", action="append", default=[], metavar="SOURCE:TARGET", help="of the container; may repeat"
    )
    asked.add_argument("--python", default=".venv/bin/python", help="on the nodes, or in the container")
    asked.add_argument("--interface", default=None, help="of the network; default: each node's own choice")
    asked.add_argument("--restarts", type=natural, default=100, help="times it may be requeued (default 100)")


def natural(text: str) -> int:
    """At least 0. Raises ValueError, as argparse wants it."""
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def positive(text: str) -> int:
    """At least 1. Raises ValueError."""
    if natural(text) == 0:
        raise ValueError(text)
    return int(text)


def allocation_of(arguments: Namespace) -> "Allocation":
    """What the options of `add_allocation` ask for."""
    from megatron_troll.launch.slurm.script import Allocation

    given: dict[str, Any] = {field.name: getattr(arguments, field.name) for field in fields(Allocation)}
    given["mounts"] = tuple(arguments.mounts)
    return Allocation(**given)


def run(arguments: Namespace) -> int:
    from megatron_troll.launch.slurm.script import check_memory, write

    try:
        config, allocation = load(arguments.config, arguments.overrides), allocation_of(arguments)
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
    """sbatch's answer, whatever it is, is the user's."""
    try:
        return FAILED if subprocess.run(["sbatch", str(path)]).returncode else 0
    except FileNotFoundError:
        sys.stderr.write(f"sbatch is not on this machine: submit {path} from a login node\n")
        return REFUSED
