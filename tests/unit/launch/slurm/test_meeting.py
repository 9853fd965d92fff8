"""Ranks find rank 0 through a file."""

import threading
from pathlib import Path

import pytest

from megatron_troll.launch.ports import PORTS
from megatron_troll.launch.slurm.rendezvous import Meeting, attend, call


def test_the_others_wait_until_rank_0_has_called(tmp_path: Path) -> None:
    file, found = tmp_path / "meeting.json", []
    other = threading.Thread(target=lambda: found.append(attend(file, 10.0)))
    other.start()
    called = call(file, "127.0.0.1")
    other.join()
    assert found == [called]
    assert called == Meeting("127.0.0.1", called.port)
    assert called.port in PORTS


def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"did its task start, and is .* on a file system that all nodes"):
        attend(tmp_path / "meeting.json", 0.01)
