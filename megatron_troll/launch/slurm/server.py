"""The servers of one node of a job: srun ... python -m megatron_troll.launch.slurm.server ARGS...

It becomes `mtroll serve ARGS...`, which listens on the address by which the other nodes reach this one. The
signals that ask a job to stop leave it be: ranks finish their step with it. The script ends it by SIGINT.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megatron_troll.launch.slurm import network


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="server")
    parser.add_argument("--interface", default=None, help="of the network; default: the one towards srun")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of mtroll serve")
    arguments = parser.parse_args(argv)
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher is None:
        parser.error("SLURM_LAUNCH_NODE_IPADDR not set: this is started by srun, a task a node")
    named = arguments.interface
    own = network.address_of(named) if named else network.address_towards(launcher)
    command = ["-m", "megatron_troll.cli", "serve", *arguments.arguments, f"serve.host={own}"]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
