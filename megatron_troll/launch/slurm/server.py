"""The servers of one node of a job: srun ... python -m megatron_troll.launch.slurm.server ARGS...

This process becomes `mtroll serve ARGS...`, which listens on the address at which the other nodes reach this
one. It ignores the signals that ask a job to stop, because the ranks still need it to finish their step. The
script ends it with SIGINT.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from megatron_troll.launch.slurm import network
from megatron_troll.system import address_towards


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="server")
    parser.add_argument("--interface", default=None, help="network interface; default: the one towards srun")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of mtroll serve")
    arguments = parser.parse_args(argv)
    launcher = os.environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if launcher is None:
        parser.error("SLURM_LAUNCH_NODE_IPADDR not set: start this with srun, one task per node")
    named = arguments.interface
    own = network.address_of(named) if named else address_towards(launcher)
    command = ["-P", "-m", "megatron_troll.cli", "serve", *arguments.arguments, f"serve.host={own}"]
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
