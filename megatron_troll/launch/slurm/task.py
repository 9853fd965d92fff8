"""One task of a job step, for one rank: srun ... python -m megatron_troll.launch.slurm.task LOGS ARGS...

Slurm sets the rank; the ranks find rank 0 through LOGS, the folder of this attempt. `mtroll ARGS...` runs as
a child process, so that this process can still report if it is killed.
"""

import argparse
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_troll.launch.local import Failure, run_ranks
from megatron_troll.launch.slurm import network
from megatron_troll.launch.slurm.rendezvous import attend, call
from megatron_troll.system import address_towards, write_atomic

MEETING = "meeting.json"
FAILED = "failed"
EXIT_CODE = "exit_code"
MEETING_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Seat:
    """A task's place in its job step. launcher: address of the node that srun runs on."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    threads: int
    launcher: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Seat":
        """Read the seat from a task's environment. Raises ValueError if `srun` did not set it."""
        missing = [name for name in ("SLURM_PROCID", "SLURM_LAUNCH_NODE_IPADDR") if name not in environment]
        if missing:
            raise ValueError(f"{', '.join(missing)} not set: start this with srun, one task per rank")
        number, world = int(environment["SLURM_NODEID"]), int(environment["SLURM_NTASKS"])
        return cls(
            rank=int(environment["SLURM_PROCID"]),
            world=world,
            local_rank=int(environment["SLURM_LOCALID"]),
            local_world=tasks_of_nodes(environment["SLURM_STEP_TASKS_PER_NODE"])[number],
            threads=int(environment.get("SLURM_CPUS_PER_TASK", "1")),
            launcher=environment["SLURM_LAUNCH_NODE_IPADDR"],
        )


def tasks_of_nodes(text: str) -> list[int]:
    """Parse Slurm's "2(x3),1" into [2, 2, 2, 1]."""
    counts = []
    for part in text.split(","):
        count, _, times = part.removesuffix(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts


def main(argv: Sequence[str]) -> int:
    """Run one rank of `mtroll ARGS...` and return its exit code."""
    parser = argparse.ArgumentParser(prog="task")
    parser.add_argument("--interface", default=None, help="network interface; default: the one towards srun")
    parser.add_argument("logs", type=Path, help="folder of this attempt, on a file system all nodes share")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of mtroll")
    arguments = parser.parse_args(argv)
    seat = Seat.of(os.environ)
    environment = join(seat, arguments.logs, arguments.interface)
    command = [sys.executable, "-P", "-m", "megatron_troll.cli", *arguments.arguments]
    failure = run_ranks(command, {seat.rank: environment}, arguments.logs)
    if failure is None:
        return 0
    blame(arguments.logs, failure)
    return failure.exit_code


def join(seat: Seat, logs: Path, interface: str | None) -> dict[str, str]:
    """The environment of a rank, once rank 0's address is known. Raises TimeoutError, ValueError."""
    file = logs / MEETING
    if seat.rank == 0:
        own = network.address_of(interface) if interface else address_towards(seat.launcher)
        meeting = call(file, own)
    else:
        meeting = attend(file, MEETING_TIMEOUT_S)
    own = interface or network.interface_with(address_towards(meeting.address))
    return {
        "RANK": str(seat.rank),
        "WORLD_SIZE": str(seat.world),
        "LOCAL_RANK": str(seat.local_rank),
        "LOCAL_WORLD_SIZE": str(seat.local_world),
        "MASTER_ADDR": meeting.address,
        "MASTER_PORT": str(meeting.port),
        "OMP_NUM_THREADS": str(seat.threads),
        **network.environment(own, os.environ),
    }


def blame(logs: Path, failure: Failure) -> None:
    """Write a file per failing rank; names sort by time, and the job ends by printing the first one, with the
    exit code of the first."""
    name = f"{time.time_ns():020d}_rank_{failure.rank.number}"
    told = f"{failure} (on {socket.gethostname()}; {failure.rank.stderr})\n"
    try:
        write_atomic(logs / FAILED / name, told)
        write_first(logs / EXIT_CODE, f"{failure.exit_code}\n")
    except OSError as error:
        sys.stderr.write(f"{told}{error}\n")


def write_first(path: Path, text: str) -> None:
    """Write a file unless another process has: srun's own exit code is that of a task that Slurm ended
    because the first one failed."""
    with suppress(FileExistsError), open(path, "x") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
