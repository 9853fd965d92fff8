"""SGLang servers as child processes: started, watched, restarted, stopped."""

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from megatron_troll.config import ConfigError
from megatron_troll.launch.sglang_flags import SGLANG, Flags
from megatron_troll.system import (
    SEGMENTS,
    Interrupts,
    end_with_parent,
    remove_abandoned,
    remove_segments,
    segments,
    temporary_folder,
)

POLL_S = 0.2
STOP_S = 30.0
NOTE_S = 2.0
# In which the kernel takes down a killed server's processes.
ENDING_S = 5.0
TAIL_LINES = 30
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class ServerFailed(RuntimeError):
    """A server does not start, or keeps dying."""


@dataclass(frozen=True)
class ServerPlan:
    """One server: the command that starts it, its flags, and the folder of its log and configuration. `key`
    is written only to the configuration, which no other user can read, until the server has read it, and is
    removed from the log."""

    argv: tuple[str, ...]
    environment: dict[str, str]
    flags: Flags
    folder: Path
    key: str

    @property
    def port(self) -> int:
        return int(self.flags["port"])

    @property
    def url(self) -> str:
        """URL at which clients reach the server."""
        host = str(self.flags["host"])
        return _url(socket.getfqdn() if host in WILDCARDS else host, self.port)

    @property
    def local_url(self) -> str:
        """URL at which this machine reaches the server."""
        host = str(self.flags["host"])
        return _url(WILDCARDS.get(host, host), self.port)

    @property
    def name(self) -> str:
        """Stem of the server's files; unique, because other machines may write to the same folder."""
        return f"server_{socket.gethostname()}_{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def arguments(self) -> Path:
        return self.folder / f"{self.name}.yaml"


class Process:
    """One running server, the leader of its own session."""

    def __init__(self, plan: ServerPlan) -> None:
        self.plan = plan
        plan.folder.mkdir(parents=True, exist_ok=True)
        plan.arguments.unlink(missing_ok=True)
        with open(os.open(plan.arguments, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            yaml.safe_dump(plan.flags | {"api-key": plan.key}, file)
        self._held, self._noted = ExitStack(), 0.0
        self._segments: set[str] = set()
        self._temporary = self._held.enter_context(temporary_folder())
        self.popen = subprocess.Popen(
            [*plan.argv, "--config", str(plan.arguments)],
            env=plan.environment | {"TMPDIR": str(self._temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_before_its_program,
        )
        self._writer = threading.Thread(target=self._write_log, daemon=True)
        self._writer.start()

    def _write_log(self) -> None:
        """Copy the server's output to its log without the key, which SGLang logs with its arguments."""
        assert self.popen.stdout is not None
        with open(self.plan.log, "ab") as log:
            for line in self.popen.stdout:
                log.write(line.replace(self.plan.key.encode(), b"(key)"))
                log.flush()

    def forget_key(self) -> None:
        """Delete the configuration, which the server has read or will never read: it holds the key. SGLang
        logs the arguments it started with."""
        self.plan.arguments.unlink(missing_ok=True)

    def note_segments(self) -> None:
        """Write down, every NOTE_S, the shared memory of the server, which it leaves if it is killed."""
        if time.monotonic() - self._noted < NOTE_S:
            return
        self._noted = time.monotonic()
        # What is no longer mapped may still be there: a process that ends unmaps before it removes.
        self._segments |= segments(self._processes())
        (self._temporary / SEGMENTS).write_text("\n".join(self._segments))

    def _processes(self) -> list[Path]:
        """The folders in /proc of the server and all that it started."""
        return [process for process in Path("/proc").glob("[0-9]*") if self._is_mine(int(process.name))]

    def _is_mine(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self.popen.pid
        except ProcessLookupError:
            return False

    @property
    def exit_code(self) -> int | None:
        return self.popen.poll()

    def healthy(self) -> bool:
        try:
            return httpx.get(f"{self.plan.local_url}/health", timeout=5.0, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def end(self, patience_s: float) -> None:
        """Wait for the server to stop, then kill it and every process it started."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(patience_s)
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self.forget_key()
        deadline = time.monotonic() + ENDING_S
        while self._processes() and time.monotonic() < deadline:
            time.sleep(POLL_S)
        remove_segments(self._temporary)
        self._held.close()
        self._writer.join(5.0)

    def last_words(self) -> str:
        lines = self.plan.log.read_text(errors="replace").splitlines()
        return "\n".join(line[:300] for line in lines[-TAIL_LINES:])


@dataclass
class ServerSlot:
    """One planned server: its current process, and how often it was restarted."""

    plan: ServerPlan
    process: Process
    restarts: int = 0
    healthy: bool = False


@dataclass(frozen=True)
class Supervisor:
    """Keeps servers running. `announce(plan, pid)` is called when a server becomes healthy, with None when it
    no longer is, and for each before the first start; `say` receives progress messages. A server that dies is
    restarted up to `restarts` times."""

    start_timeout_s: float
    restarts: int
    announce: Callable[[ServerPlan, int | None], object]
    say: Callable[[str], object]

    def run(self, plans: Sequence[ServerPlan], interrupts: Interrupts) -> None:
        """Run until asked to stop, then stop every server. Raises ServerFailed, after stopping them, if one
        does not become healthy in time or dies too often."""
        for plan in plans:
            _check_port(plan)
        remove_abandoned()
        for plan in plans:  # what a killed command left; only now is it sure that its server is gone
            self.announce(plan, None)
        deadline = time.monotonic() + self.start_timeout_s
        slots = [ServerSlot(plan, Process(plan)) for plan in plans]
        try:
            while not interrupts.asked:
                for slot in slots:
                    self._look_after(slot, deadline)
                time.sleep(POLL_S)
        finally:
            self._stop(slots)

    def _look_after(self, slot: ServerSlot, deadline: float) -> None:
        plan, process = slot.plan, slot.process
        if process.exit_code is not None:
            self._replace(slot)
        elif not slot.healthy and process.healthy():
            slot.healthy = True
            process.forget_key()
            self.announce(plan, process.popen.pid)
            self.say(f"{plan.url} is healthy; its log is {plan.log}")
        elif slot.healthy:
            process.note_segments()
        elif slot.restarts == 0 and time.monotonic() > deadline:
            raise ServerFailed(
                f"{plan.url} is not healthy after {self.start_timeout_s:g} s (serve.start_timeout_s). The "
                f"end of {plan.log}:\n{process.last_words()}"
            )

    def _replace(self, slot: ServerSlot) -> None:
        """Start a new process in place of one that has ended."""
        plan, process = slot.plan, slot.process
        if slot.healthy:
            self.announce(plan, None)
        process.end(0.0)
        ended = f"the server at {plan.url} ended with code {process.exit_code}"
        if not slot.healthy or slot.restarts == self.restarts:
            when = f"after {slot.restarts} restarts" if slot.healthy else "before it was healthy"
            raise ServerFailed(f"{ended} {when}. The end of {plan.log}:\n{process.last_words()}")
        self.say(f"{ended}; starting it again")
        slot.process, slot.healthy, slot.restarts = Process(plan), False, slot.restarts + 1

    def _stop(self, slots: Sequence[ServerSlot]) -> None:
        for slot in slots:
            if slot.healthy:  # otherwise another command may have registered one at the same address
                self.announce(slot.plan, None)
            slot.process.popen.terminate()
        deadline = time.monotonic() + STOP_S
        for slot in slots:
            slot.process.end(max(0.0, deadline - time.monotonic()))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def refusal(host: str, port: int) -> str | None:
    """Reason why nothing can listen on this address and port now; None if it is free."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.strerror or str(error)
        except OverflowError as error:  # no such port
            return str(error)
    return None


def _check_port(plan: ServerPlan) -> None:
    host = str(plan.flags["host"])
    if why := refusal(host, plan.port):
        raise ServerFailed(f"{host} port {plan.port}: {why}; set serve.port or serve.host")


def _before_its_program() -> None:
    """Let this server get SIGKILL when its parent dies in any way; its children follow it. Slurm's SIGUSR1,
    which asks ranks to save, does not end it. SIGTERM, which every process of a preempted job gets, does end
    it (Python unblocks that one), and it is restarted."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


def environment(device: str, threads: int) -> dict[str, str]:
    """The servers' environment: this process's, without the variables of its own Python."""
    theirs = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    theirs |= {
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # /health is polled often, and by default each answer generates a token.
        "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
    }
    if device == "cpu":
        theirs |= {
            "SGLANG_USE_CPU_ENGINE": "1",
            "SGLANG_CPU_OMP_THREADS_BIND": "all",
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
    return theirs


def interpreter(named: str) -> Path:
    """The absolute path of serve.python, a file or a command on PATH. Links are not resolved: the interpreter
    of a virtual environment is one. Raises ConfigError."""
    found = shutil.which(named)
    if found is None:
        raise ConfigError(
            f"serve.python: {named} not found: run `make sglang-env` on a machine without a GPU, or install "
            f"SGLang {SGLANG} in an environment of its own and name its interpreter"
        )
    return Path(found).absolute()


def command(python: str, device: str) -> tuple[str, ...]:
    """The command that starts a server, without its flags."""
    return (python, "-P", "-m", "sglang_cpu.serve" if device == "cpu" else "sglang.launch_server")
