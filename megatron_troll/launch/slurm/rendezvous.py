"""The rendezvous of a job's ranks: rank 0 writes its address and port to a file that every node sees."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_troll.launch.ports import free_port
from megatron_troll.system import write_atomic

PERIOD_S = 0.2


@dataclass(frozen=True)
class Meeting:
    """Address and TCP port of rank 0's rendezvous."""

    address: str
    port: int


def call(file: Path, address: str) -> Meeting:
    """Run on rank 0: choose a port of `address` that nothing listens on now, and write it to `file`."""
    meeting = Meeting(address, free_port(address))
    write_atomic(file, json.dumps(asdict(meeting)))
    return meeting


def attend(file: Path, timeout_s: float) -> Meeting:
    """Run on the other ranks: wait for the file that `call` writes. Raises TimeoutError."""
    end = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() > end:
            raise TimeoutError(
                f"rank 0 has not written {file} in {timeout_s:g} s: did its task start, and is "
                f"{file.parent} on a file system that all nodes share?"
            )
        time.sleep(PERIOD_S)
    return Meeting(**json.loads(file.read_text()))
