"""`mtroll plan`: memory and traffic of every rank, without a GPU."""

import argparse
import json
import sys
from argparse import Namespace

from megatron_troll.config import ConfigError
from megatron_troll.observe.opened import load_opened
from megatron_troll.system import REFUSED

DOES_NOT_FIT = 1


def add_to(commands: "argparse._SubParsersAction") -> None:
    """Add the `plan` command and its options."""
    about = "memory and traffic of every rank, and whether it fits; needs no GPU and no weights"
    parser = commands.add_parser("plan", help=about, description=about)
    parser.add_argument("config", help="YAML file, or a run folder")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON, all sizes in bytes")
    parser.set_defaults(run=run)


def run(arguments: Namespace) -> int:
    """Print the plan. Return 0 if it fits, 1 if it does not, 2 if the configuration is refused."""
    from rich.console import Console

    from megatron_troll.launch.plan.build import plan
    from megatron_troll.launch.plan.table import tables

    try:
        planned = plan(load_opened(arguments.config, arguments.overrides))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    if arguments.json:
        sys.stdout.write(json.dumps(planned.as_dict(), indent=2) + "\n")
    else:
        Console().print(tables(planned))
    return 0 if planned.fits else DOES_NOT_FIT
