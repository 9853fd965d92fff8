"""Programs that misbehave, as real processes: each is contained and leaves nothing behind."""

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_troll.rewards import sandbox
from megatron_troll.rewards.sandbox import Finished, Kind, Limits, Sandbox, SandboxError

SMALL = Limits(cpu_s=2, memory_mb=256, processes=6, file_mb=1, disk_mb=4)


def box(kind: Kind, limits: Limits = SMALL) -> Sandbox:
    if kind == "namespaces" or os.geteuid() != 0:
        return Sandbox(kind, limits)
    everyones = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if everyones is None:
        pytest.skip("as root, limits needs an interpreter that nobody may start")
    return Sandbox(kind, limits, everyones)


def run(kind: Kind, program: str, stdin: str = "", wall_s: float = 5.0) -> Finished:
    return box(kind).run(program, stdin, wall_s)


def processes_with(marker: str) -> list[str]:
    """Command lines that hold it, of every process on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [line for line in found if marker in line]


def eventually(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10.0
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.05)
    return holds()


def gone(marker: str) -> bool:
    return eventually(lambda: not processes_with(marker))


@pytest.fixture
def folders():
    """Where sandboxes have their folders; anyone may pass through."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


both = pytest.mark.parametrize("kind", ["namespaces", "limits"])


def test_an_interpreter_in_tmp_behind_a_link(folders):
    """A virtual environment in a checkout that lies there."""
    venv.create(folders / "real", with_pip=False)
    (folders / "link").symlink_to("real")
    python = str(folders / "link" / "bin" / "python")
    program = "import sys, tempfile; tempfile.TemporaryFile(); print(sys.prefix)"
    finished = Sandbox("namespaces", SMALL, python).run(program, "", 5.0)
    assert finished == Finished(0, f"{folders / 'link'}\n", False)


@both
def test_a_harmless_program(kind):
    finished = run(kind, "import sys\nprint(input(), len(sys.stdin.read()))\nsys.exit(3)", "first\nrest\n")
    assert finished == Finished(3, "first 5\n", False)


@both
@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "while True: pass"])
def test_code_that_never_ends(kind, program):
    start = time.monotonic()
    finished = run(kind, program, wall_s=1.0)
    assert finished.timed_out
    assert time.monotonic() - start < 4


@both
def test_cpu_time_runs_out(kind):
    brief = SMALL.model_copy(update={"cpu_s": 1})
    finished = box(kind, brief).run("while True: pass", "", wall_s=20.0)
    assert not finished.timed_out
    assert finished.code in (128 + signal.SIGKILL, 128 + signal.SIGXCPU)


@both
def test_a_fork_bomb(kind):
    """Its processes are counted, and none is left."""
    marker = secrets.token_hex(8)
    program = f"""
import os, sys, time
children = 0
try:
    while True:
        if os.fork() == 0:
            os.setsid()
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "{marker}"])
        children += 1
except OSError as error:
    print(error.strerror, children)
time.sleep(0.5)
"""
    finished = run(kind, program)
    assert finished.output == "Resource temporarily unavailable 5\n"
    assert gone(marker)


@both
def test_processes_that_outlive_the_answer(kind):
    """A daemon of its own session, whose parent has ended."""
    marker = secrets.token_hex(8)
    program = f"""
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "{marker}"])
    os._exit(0)
os.wait()
"""
    finished = run(kind, program)
    assert finished.code == 0
    assert gone(marker)


@both
def test_nothing_outlives_the_one_who_asked(kind, folders):
    """The worker is killed while an answer runs: neither processes nor files are left."""
    marker = secrets.token_hex(8)
    sleep = (
        "import os, sys\n"
        f"os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(60)', '{marker}'])"
    )
    worker = (
        "from megatron_troll.rewards.sandbox import *\n"
        f"Sandbox({kind!r}, Limits(), {box(kind).python!r}).run({sleep!r}, '', 60.0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folders)}
    asking = subprocess.Popen([sys.executable, "-c", worker], env=environment)
    deadline = time.monotonic() + 20
    while not any(line.endswith(f"{marker}\0") for line in processes_with(marker)):
        assert time.monotonic() < deadline, "the answer never started"
        time.sleep(0.05)
    assert len(list(folders.iterdir())) == 1
    asking.kill()
    asking.wait()
    assert gone(marker)
    assert eventually(lambda: not list(folders.iterdir()))


def test_the_folder_of_a_killed_trainer_is_removed_at_the_next_start(folders, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    for name in ("abandoned", "in-use"):
        (folders / f"mtroll-{name}").mkdir()
        (folders / f"mtroll-{name}" / "lock").touch()
    with open(folders / "mtroll-in-use" / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Sandbox("namespaces", SMALL).probe()
    assert [path.name for path in folders.iterdir()] == ["mtroll-in-use"]


@both
def test_memory(kind):
    finished = run(kind, "try:\n    bytearray(1 << 30)\nexcept MemoryError:\n    print('refused')")
    assert finished.output == "refused\n"


@both
def test_one_large_file(kind):
    program = (
        "try:\n    open('x', 'wb').write(bytes(3 << 20))\nexcept OSError as error:\n    print(error.strerror)"
    )
    assert run(kind, program).output == "File too large\n"


@both
def test_endless_output(kind):
    finished = run(kind, "while True: print('x' * 9999)")
    assert finished.code != 0
    assert len(finished.output) <= 1 << 20


def test_a_full_disk():
    """Many small files: the folder has an end, and is gone afterwards."""
    program = """
n = 0
try:
    while True:
        with open(str(n), "wb") as file:
            file.write(bytes(1 << 19))
        n += 1
except OSError as error:
    print(error.strerror, n)
"""
    assert run("namespaces", program).output in (f"No space left on device {n}\n" for n in (6, 7, 8))


@both
def test_the_folder_is_deleted(kind, monkeypatch, folders):
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    program = "import os; os.makedirs('a/b'); open('a/b/c', 'w').write('x'); os.chmod('a', 0); print('made')"
    assert run(kind, program).output == "made\n"
    assert list(folders.iterdir()) == []


@both
def test_no_network(kind):
    """Not even to a server on this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"""
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), 2)
except OSError as error:
    print("refused")
"""
        assert run(kind, program).output == "refused\n"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_no_other_files_or_processes_and_no_way_back_to_them():
    """The interpreter is read-only, the rest of the machine not there; nothing can be mounted, no further
    user namespace made, no other root chosen."""
    program = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
print(os.path.exists("/etc/passwd"), os.path.exists("/proc/self"), os.getppid(), os.getpid())
print(libc.unshare(0x10000000), libc.mount(b"tmpfs", b"/box", b"tmpfs", 0, None), libc.chroot(b"/box"))
for path in ("/usr/new", "/new"):
    try:
        open(path, "a")
    except OSError as error:
        print(error.strerror)
"""
    lines = run("namespaces", program).output.splitlines()
    assert lines[:2] == ["False False 0 1", "-1 -1 -1"]
    assert lines[2] == "Read-only file system"
    if os.geteuid() == 0:
        assert lines[3] == "Permission denied"


def test_root_runs_answers_as_nobody():
    if os.geteuid() != 0:
        pytest.skip("not root")
    for kind in ("namespaces", "limits"):
        assert run(kind, "import os; print(os.getuid(), os.getgroups())").output == "65534 []\n"


@pytest.mark.parametrize("wall_s", [1e-6, 0.001, 0.02, 0.1])
@both
def test_time_that_is_over_before_the_program_runs_is_no_failure_of_the_sandbox(kind, wall_s):
    assert box(kind).run("print(1); import time; time.sleep(9)", "", wall_s).timed_out


@both
def test_a_machine_without_a_temporary_folder(kind, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(SandboxError, match=r"cannot be set up: .*No such file or directory: '/no/such"):
        box(kind).run("print()", "", 5.0)


def test_a_sandbox_that_cannot_be_set_up(monkeypatch):
    """Nothing runs, and the message says what failed."""
    monkeypatch.setattr(sandbox, "visible", lambda python: ["/no/such/folder"])
    with pytest.raises(SandboxError, match=r"mount .*/no/such/folder: No such file or directory"):
        Sandbox("namespaces", SMALL).run("print()", "", 5.0)


@both
def test_an_interpreter_that_does_not_start(kind):
    with pytest.raises(SandboxError, match="'/no/such/python' does not start"):
        Sandbox(kind, SMALL, "/no/such/python").probe()
