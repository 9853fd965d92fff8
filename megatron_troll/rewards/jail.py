"""Program that confines itself, then executes one answer: `python -I -S jail.py spec.json`.

It is self-contained (standard library only). rewards/sandbox.py starts it and documents the guarantees.
An error before the answer runs is a traceback on stderr; the answer itself has no stderr.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

NEWNS, NEWUTS, NEWIPC = 0x00020000, 0x04000000, 0x08000000
NEWUSER, NEWPID, NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MNT_DETACH = 442, -100, 0x8000, 2
ATTR_RDONLY, ATTR_NOSUID = 0x1, 0x2
SET_PDEATHSIG, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 1, 36, 38
NOBODY = 65534
TIMED_OUT = 124
MIB = 1 << 20

ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": ".",
    "LANG": "C.UTF-8",
    **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")},
}
LIBC = ctypes.CDLL(None, use_errno=True)


class Late(Exception):
    """The answer ran out of time."""


class Orphaned(Exception):
    """The process that requested the run has died."""


def main(path: str) -> None:
    spec = json.loads(Path(path).read_text())
    end_with(spec["parent"])
    leave(in_namespaces(spec) if spec["kind"] == "namespaces" else under_supervision(spec))


def in_namespaces(spec: dict[str, Any]) -> int:
    """Run the answer as the first process of its own namespaces and return its exit code. When the answer or
    this process ends, the kernel kills every process that the answer started."""
    unshare(spec)
    alive, held_open = os.pipe()
    child = fork()
    if child:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except Orphaned:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            delete(spec)
            return 1
    os.close(held_open)
    check("prctl", LIBC.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # the parent died before PDEATHSIG was set
    os.close(alive)
    build_root(spec)
    become_nobody(spec)
    # A new user namespace counts its own processes; after chroot, the answer cannot create another one.
    check("unshare", LIBC.unshare(NEWUSER))
    os.chroot(".")
    os.chdir("/box")
    check("prctl", LIBC.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # the change of credentials cleared it
    run(spec, spec["limits"]["processes"], ["-I", "-B", "main.py"])


def under_supervision(spec: dict[str, Any]) -> int:
    """Run the answer and return its exit code, TIMED_OUT after `wall_s`. This process becomes the parent of
    processes that the answer leaves behind, and kills them."""
    check("prctl", LIBC.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0))
    signal.signal(signal.SIGALRM, late)
    child = fork()
    if child:
        code, orphaned = supervised(child, spec["wall_s"])
        end_descendants()
        if orphaned:
            delete(spec)
        return code
    os.chdir(spec["box"])
    if spec["root_user"]:
        os.chown(".", NOBODY, NOBODY)
    become_nobody(spec)
    tasks = tasks_of(os.getuid()) - 1 + spec["limits"]["processes"]
    run(spec, tasks, ["-I", "-B", "-c", NO_SOCKETS])


def fork() -> int:
    """Fork like os.fork, but the child gets the default action of SIGTERM instead of the handler of
    `end_with`; SIGTERM stays blocked in it until `run` unblocks signals."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    child = os.fork()
    if child:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return child


def supervised(child: int, wall_s: float) -> tuple[int, bool]:
    """Exit code of `child`, and whether the requesting process has died, so that nobody will read it. The
    alarm rings in here only: elsewhere, Late would look like a failure of the sandbox."""
    try:
        signal.setitimer(signal.ITIMER_REAL, wall_s)
        status = os.waitpid(child, 0)[1]
        signal.setitimer(signal.ITIMER_REAL, 0)
        return os.waitstatus_to_exitcode(status), False
    except Late:
        return TIMED_OUT, False
    except Orphaned:
        return 1, True


NO_SOCKETS = """
import runpy, sys
def refuse(event, arguments):
    if event.startswith("socket."):
        raise PermissionError("no network in this sandbox")
sys.addaudithook(refuse)
runpy.run_path("main.py", run_name="__main__")
"""


def unshare(spec: dict[str, Any]) -> None:
    """Give this process its own mounts, network (with no device up), processes, IPC and host name. A user
    who is not root gets them through a user namespace in which it is root."""
    flags = NEWNS | NEWNET | NEWPID | NEWIPC | NEWUTS
    uid, gid = os.geteuid(), os.getegid()
    if spec["root_user"]:
        check("unshare", LIBC.unshare(flags))
        return
    check("unshare", LIBC.unshare(flags | NEWUSER))
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def build_root(spec: dict[str, Any]) -> None:
    """Mount a file system of `disk_mb` in memory that shows the interpreter and its libraries, read-only, and
    a /box that holds only the files of the program; then change into it."""
    root, size = spec["root"], spec["limits"]["disk_mb"]
    mount("none", "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={size}m,nr_inodes=4096,mode=755")
    for path in spec["visible"]:
        show(path, root + path)
    box = Path(root, "box")
    box.mkdir()
    shutil.copytree(spec["box"], box, dirs_exist_ok=True)
    show(spec["stdin"], root + "/dev/stdin")
    if spec["root_user"]:
        os.chown(box, NOBODY, NOBODY)
    # It exists already if the interpreter is in /tmp.
    if not Path(root, "tmp").exists():
        Path(root, "tmp").symlink_to("box")
    os.chdir(root)


def show(path: str, at: str) -> None:
    os.makedirs(os.path.dirname(at), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), at)
        return
    if os.path.isdir(path):
        os.makedirs(at, exist_ok=True)
    else:
        Path(at).touch()
    mount(path, at, None, MS_BIND | MS_REC)
    attributes = (ctypes.c_uint64 * 4)(ATTR_RDONLY | ATTR_NOSUID, 0, 0, 0)
    size = ctypes.sizeof(attributes)
    done = LIBC.syscall(MOUNT_SETATTR, AT_FDCWD, at.encode(), AT_RECURSIVE, attributes, size)
    check(f"mount_setattr {at}", done)


def become_nobody(spec: dict[str, Any]) -> None:
    """Drop root rights; any other user has none to drop."""
    if spec["root_user"]:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def run(spec: dict[str, Any], processes: int, arguments: list[str]) -> NoReturn:
    """Set the limits and exec the interpreter. A non-root user keeps no capability over its namespace."""
    limits = spec["limits"]
    ceilings = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_AS: limits["memory_mb"] * MIB,
        resource.RLIMIT_FSIZE: limits["file_mb"] * MIB,
        resource.RLIMIT_NPROC: processes,
        resource.RLIMIT_NOFILE: 128,
        resource.RLIMIT_CORE: 0,
    }
    for what, ceiling in ceilings.items():
        resource.setrlimit(what, (ceiling, ceiling))
    check("prctl", LIBC.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    errors = os.dup(2)
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    try:
        os.execve(spec["python"], [spec["python"], *arguments], ENVIRONMENT)
    except OSError as error:
        os.write(errors, f"{spec['python']}: {error}".encode())
        os._exit(1)


def late(*_: object) -> NoReturn:
    raise Late


def end_with(parent: int) -> None:
    """Raise Orphaned when the process `parent` dies. A SIGTERM for any other reason is ignored."""

    def ask(*_: object) -> None:
        if os.getppid() != parent:
            raise Orphaned

    signal.signal(signal.SIGTERM, ask)
    check("prctl", LIBC.prctl(SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    ask()


def delete(spec: dict[str, Any]) -> None:
    """Delete the folder of an orphaned run. `root` is not traversed: the system's files are mounted there."""
    LIBC.umount2(spec["root"].encode(), MNT_DETACH)
    os.rmdir(spec["root"])
    shutil.rmtree(Path(spec["root"]).parent)


def end_descendants() -> None:
    """Kill the children of this process, and those that it inherits when they die, until none is left."""
    while True:
        for pid in children_of(os.getpid()):
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def children_of(parent: int) -> list[int]:
    return [pid for pid, stat in processes() if int(stat.rpartition(")")[2].split()[1]) == parent]


def tasks_of(uid: int) -> int:
    """Number of processes and threads of a user: RLIMIT_NPROC counts them all."""
    return sum(int(stat.rpartition(")")[2].split()[17]) for pid, stat in processes() if owner(pid) == uid)


def processes() -> Iterator[tuple[int, str]]:
    """Process ids with the text of /proc/<pid>/stat; processes that end meanwhile are left out."""
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield int(name), Path("/proc", name, "stat").read_text()


def owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except (FileNotFoundError, ProcessLookupError):
        return None


def mount(source: str, at: str, kind: str | None, flags: int, options: str = "") -> None:
    done = LIBC.mount(source.encode(), at.encode(), kind and kind.encode(), flags, options.encode())
    check(f"mount {at}", done)


def check(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def leave(code: int) -> NoReturn:
    """Exit with the exit code of the answer, 128 + n if signal n ended it."""
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main(sys.argv[1])
