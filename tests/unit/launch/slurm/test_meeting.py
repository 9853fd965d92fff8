"""Ranks find rank 0 through a file."""

import socket
import threading
from pathlib import Path

import pytest

from megatron_troll.launch.slurm import rendezvous as meeting
from megatron_troll.launch.slurm.rendezvous import Meeting, attend, call, free_port


def test_the_others_wait_until_rank_0_has_called(tmp_path: Path) -> None:
    file, found = tmp_path / "meeting.json", []
    other = threading.Thread(target=lambda: found.append(attend(file, 10.0)))
    other.start()
    called = call(file, "127.0.0.1")
    other.join()
    assert found == [called]
    assert called == Meeting("127.0.0.1", called.port)
    assert called.port in meeting.PORTS


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did its task start, and is .* on a file system that all nodes"):
        attend(tmp_path / "meeting.json", 0.01)


def test_a_taken_port_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        monkeypatch.setattr(meeting, "PORTS", range(port, port + 1))
        with pytest.raises(OSError, match=f"every TCP port of 127.0.0.1 from {port} to {port} is taken"):
            free_port("127.0.0.1")


def test_an_address_of_another_machine_is_an_error() -> None:
    with pytest.raises(OSError, match="Cannot assign"):
        free_port("192.0.2.1")
