"""The rendezvous of a job's ranks: rank 0 writes its address and port to a file that every node sees."""

import errno
import json
import random
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_troll.system import write_atomic

# Below the ephemeral ports, which any process may take at any time.
PORTS = range(20_000, 32_000)
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


def free_port(address: str) -> int:
    """Return a free port of PORTS. Raises OSError if all are taken or `address` is not one of this
    machine."""
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
    raise OSError(f"every TCP port of {address} from {PORTS.start} to {PORTS.stop - 1} is taken")
