"""A chosen port is nobody's, and stays so until somebody listens on it."""

import socket
from pathlib import Path

import pytest

from megatron_troll.launch import ports
from megatron_troll.launch.ports import PORTS, free_port


def test_no_connection_is_given_a_chosen_port() -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not set(PORTS) & set(range(first, last + 1))
    assert free_port() in PORTS


def test_a_taken_port_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(ports, "PORTS", range(port, port + 1))
        with pytest.raises(OSError, match=f"every TCP port of 127.0.0.1 from {port} to {port} is taken"):
            free_port("127.0.0.1")


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="Cannot assign"):
        free_port("192.0.2.1")
