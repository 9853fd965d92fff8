"""Sandbox for untrusted programs, in which they can do little harm.

`namespaces` (Linux 5.14 or newer; root, or a user who may create user namespaces). The program sees the
interpreter and its libraries, read-only, and an empty folder in memory; no other file, process or network
device. When it ends or times out, the kernel kills everything it started. CPU time, address space and file
size are limited per process; the number of processes and the disk space are limited per program.

`limits` is for machines that forbid namespaces, and for code that is careless rather than hostile: the same
limits per process, an audit hook that refuses sockets in Python, and leftover processes are killed. The
program runs as the trainer's user (as nobody if that is root): it can read and write what that user can,
send signals, reach the network through another program, and write any number of files. In this mode, a
signal to every process of a job, such as a preemption, ends the program, and the answer counts as failed.

Neither mode limits the total memory (the job's cgroup does) or protects against bugs of the kernel.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_troll.config import Node, Positive
from megatron_troll.rewards import jail
from megatron_troll.rewards.reward import MachineError
from megatron_troll.system import remove_abandoned, temporary_folder

Kind = Literal["namespaces", "limits"]
LIBRARIES = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
GRACE_S = 5.0


class Limits(Node):
    """Resource limits of one run of a program."""

    cpu_s: Positive = Field(default=4, description="CPU seconds of each process")
    memory_mb: Annotated[int, Field(ge=64)] = Field(default=512, description="address space of each process")
    processes: Positive = Field(default=8, description="processes and threads at once")
    file_mb: Positive = Field(default=16, description="largest file, and output")
    disk_mb: Positive = Field(
        default=64, description="all files together; `sandbox: limits` cannot enforce it"
    )


class SandboxError(MachineError):
    """The sandbox could not be set up; the message says what failed."""


@dataclass(frozen=True)
class Finished:
    """code: exit code of the program, 128 + n if signal n ended it. output: its stdout."""

    code: int
    output: str
    timed_out: bool


@dataclass(frozen=True)
class Sandbox:
    """Runs Python programs, one per call; calls may overlap."""

    kind: Kind
    limits: Limits
    python: str = sys.executable

    def probe(self) -> None:
        """Raises SandboxError if this kind of sandbox does not work on this machine. Removes what a killed
        trainer left."""
        remove_abandoned()
        finished = self.run("print(40 + 2)", "", 10.0)
        if finished.output != "42\n":
            raise SandboxError(f"a trial program ended with code {finished.code} and no output")

    def run(self, program: str, stdin: str, wall_s: float) -> Finished:
        """Run the program as its own __main__, with `stdin`, in an empty folder. Blocks for at most `wall_s`
        seconds, plus a little to start and clean up."""
        with self.started({"main.py": program}, stdin, wall_s) as running:
            return running.finished()

    @contextmanager
    def started(
        self, files: Mapping[str, str], stdin: str, wall_s: float, descriptor: int | None = None
    ) -> Iterator["Running"]:
        """Start main.py of `files` (text by path), in a folder that holds only these; it ends with the block.
        It inherits the file descriptor. Raises SandboxError if it could not be started or confined. Other
        errors of files (with `limits`, a program may remove its own) are OSError."""
        with ExitStack() as held:
            with starting():
                folder = held.enter_context(temporary_folder())
                self._fill(folder, files, stdin, wall_s)
                running = Running(folder, self._start(folder, descriptor), self._patience(wall_s))
            try:
                yield running
            finally:
                running.end(GRACE_S if self.kind == "limits" else 0.0)
            if problem := (folder / "errors").read_text(errors="replace").strip():
                raise SandboxError(problem.splitlines()[-1])

    def _fill(self, folder: Path, files: Mapping[str, str], stdin: str, wall_s: float) -> None:
        for part in ("box", "root"):
            (folder / part).mkdir()
        for path, text in files.items():
            (folder / "box" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "box" / path).write_text(text, encoding="utf-8", errors="surrogatepass")
        (folder / "stdin").write_text(stdin, encoding="utf-8", errors="surrogatepass")
        (folder / "stdin").chmod(0o644)
        (folder / "spec.json").write_text(json.dumps(self._spec(folder, wall_s)))
        folder.chmod(0o711)

    def _spec(self, folder: Path, wall_s: float) -> dict[str, object]:
        return {
            "kind": self.kind,
            "parent": os.getpid(),
            "root_user": os.geteuid() == 0,
            "python": self.python,
            "visible": visible(self.python),
            "box": str(folder / "box"),
            "stdin": str(folder / "stdin"),
            "root": str(folder / "root"),
            "wall_s": wall_s,
            "limits": self.limits.model_dump(),
        }

    def _start(self, folder: Path, descriptor: int | None) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", jail.__file__, str(folder / "spec.json")]
        with (
            (folder / "stdin").open() as stdin,
            (folder / "stdout").open("w") as stdout,
            (folder / "errors").open("w") as errors,
        ):
            return subprocess.Popen(
                command,
                stdin=stdin,
                stdout=stdout,
                stderr=errors,
                start_new_session=True,
                pass_fds=() if descriptor is None else (descriptor,),
            )

    def _patience(self, wall_s: float) -> float:
        """Seconds to wait. With `limits`, jail.py enforces the time limit, because it has to clean up."""
        return wall_s if self.kind == "namespaces" else wall_s + GRACE_S


@contextmanager
def starting() -> Iterator[None]:
    """Raise SandboxError for an OSError of the block: no program has run yet that could have caused it."""
    try:
        yield
    except OSError as error:
        raise SandboxError(f"the sandbox cannot be set up: {error}") from error


@dataclass(frozen=True)
class Running:
    """A program that was started."""

    folder: Path
    process: subprocess.Popen[bytes]
    patience: float

    def finished(self) -> Finished:
        """Wait for its end, or end it when its time is over."""
        try:
            code = self.process.wait(self.patience)
        except subprocess.TimeoutExpired:
            code = jail.TIMED_OUT
        self.end(0.0)
        output = (self.folder / "stdout").read_text(errors="replace")
        return Finished(code, output, code == jail.TIMED_OUT)

    def end(self, grace_s: float) -> None:
        """End it, after `grace_s` seconds in which it may end by itself."""
        try:
            self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@cache
def visible(python: str) -> list[str]:
    """Paths that the interpreter and its packages need, none inside another. Starts the interpreter once."""
    report = "import sys; print(sys.prefix, sys.base_prefix, sep=chr(10))"
    try:
        said = subprocess.run([python, "-I", "-c", report], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SandboxError(f"the interpreter {python!r} does not start: {error}") from error
    real = str(Path(os.path.realpath(python)).parents[1])
    prefixes = said.stdout.split("\n")
    needed = {*LIBRARIES, *DEVICES, *prefixes, *map(os.path.realpath, filter(None, prefixes)), real}
    paths = sorted(path for path in needed if os.path.lexists(path))
    return [path for path in paths if not any(path.startswith(f"{other}/") for other in paths)]
