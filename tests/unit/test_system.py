"""A process that is asked to stop keeps the helpers it needs; what a killed one leaves is removed."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from megatron_troll.system import (
    ASKING,
    SEGMENTS,
    remove_abandoned,
    remove_segments,
    segments,
    spared,
    temporary_folder,
)


def still_runs_after(number: int, context: AbstractContextManager[None]) -> bool:
    with context:
        process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    time.sleep(0.2)
    process.send_signal(number)
    process.communicate(b"\n")
    return process.returncode == 0


# Not SIGINT: a shell that puts these tests in the background has it ignored for all their processes.
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_helpers_go_on(number):
    assert still_runs_after(number, spared())
    assert not still_runs_after(number, nullcontext())


def test_the_signals_of_this_process_are_as_before():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with spared():
        assert before | set(ASKING) == signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert before == signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_pythons_own_helper_processes_are_spared_too():
    """The resource tracker unblocks signals where it starts, which the first spawn of a program does."""
    program = "from tests.unit.test_system import manager_survives; assert manager_survives()"
    subprocess.run([sys.executable, "-c", program], check=True)


def manager_survives() -> bool:
    with spared():
        manager = multiprocessing.get_context("spawn").Manager()
    for number in ASKING:
        os.kill(manager._process.pid, number)  # pyright: ignore[reportAttributeAccessIssue]
    return manager.list([1])[0] == 1


def test_a_temporary_folder_lasts_as_long_as_its_process(tmp_path, monkeypatch):
    program = """
import multiprocessing.managers, os, signal
from megatron_troll.system import end_with_parent, work_in_temporary_folder
if __name__ == "__main__":
    work_in_temporary_folder()
    manager = multiprocessing.managers.SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    forked = multiprocessing.get_context("fork").Process(target=print)
    forked.start()
    forked.join()
    (inside,) = os.listdir(os.environ["TMPDIR"] + "/..")
    print(inside, any(name.startswith("pymp-") for name in os.listdir(os.environ["TMPDIR"])), flush=True)
    os.kill(os.getpid(), signal.SIGKILL) if input() == "kill" else manager.shutdown()
"""
    (tmp_path / "program.py").write_text(program)
    parent = Path(tempfile.mkdtemp(dir="/tmp"))  # pytest's is too long for sockets
    environment = os.environ | {"TMPDIR": str(parent), "PYTHONPATH": os.getcwd()}
    for answer, left in (("end", 0), ("kill", 1)):
        done = subprocess.run(
            [sys.executable, tmp_path / "program.py"],
            env=environment,
            input=answer,
            text=True,
            capture_output=True,
        )
        assert done.stdout.split()[-1] == "True", done.stderr
        assert len(list(parent.iterdir())) == left
    monkeypatch.setattr(tempfile, "tempdir", str(parent))
    remove_abandoned()
    parent.rmdir()


def test_shared_memory_of_a_dead_process_goes_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine, dead = (SharedMemory(create=True, size=8) for _ in range(2))
    try:
        assert f"/dev/shm/{dead.name}" in segments([Path("/proc/self")])
        dead.close()
        with temporary_folder() as folder:
            (folder / SEGMENTS).write_text(f"/dev/shm/{mine.name}\n/dev/shm/{dead.name}\n")
            remove_abandoned()  # it is in use
            assert Path(f"/dev/shm/{dead.name}").exists()
            remove_segments(folder)
        assert not Path(f"/dev/shm/{dead.name}").exists()
        assert Path(f"/dev/shm/{mine.name}").exists()
    finally:
        mine.close()
        mine.unlink()
        resource_tracker.unregister(f"/{dead.name}", "shared_memory")
