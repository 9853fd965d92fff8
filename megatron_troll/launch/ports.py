"""TCP ports that nothing listens on."""

import errno
import random
import socket

# Below the ephemeral ports: the kernel gives those to any connection, also between the choice of one here and
# the start of what is to listen on it, which takes a server many seconds.
PORTS = range(20_000, 32_000)


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port of PORTS, by chance one that nothing at an IPv4 `address` listens on now. Raises OSError
    if all are taken or `address` is not one of this machine."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):  # not that of a seed, which others may share
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return port
    raise OSError(f"every TCP port of {address} from {PORTS.start} to {PORTS.stop - 1} is taken")
