"""Servers of one command and of another at the same address."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_troll.launch.servers import ServerFailed, ServerPlan, Supervisor
from megatron_troll.system import Interrupts


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which a server listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def plan(folder: Path, port: int, *argv: str) -> ServerPlan:
    flags = {"host": "127.0.0.1", "port": port}
    return ServerPlan(argv or ("false",), dict(os.environ), flags, folder, "key")


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def announced(plans: list[ServerPlan]) -> list[tuple[int, int | None]]:
    """Ports and processes that a command announces until it fails."""
    told: list[tuple[int, int | None]] = []
    supervisor = Supervisor(30.0, 0, lambda one, pid: told.append((one.port, pid)), lambda line: None)
    with pytest.raises(ServerFailed):
        supervisor.run(plans, Interrupts())
    return told


def test_a_second_command_at_the_same_port_takes_nothing_away(tmp_path: Path, taken: int) -> None:
    assert announced([plan(tmp_path, free()), plan(tmp_path, taken)]) == []


def test_what_a_killed_command_left_is_taken_away_once_before_the_start(tmp_path: Path) -> None:
    port = free()
    assert announced([plan(tmp_path, port)]) == [(port, None)]
