"""Real SGLang servers for tests, forked from one process that has imported SGLang."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx

from megatron_troll.launch.ports import free_port
from megatron_troll.launch.servers import environment
from megatron_troll.launch.sglang_flags import ON_CPU, Flags

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
START_S = 300.0


@dataclass(frozen=True)
class RealServer:
    """One server, the leader of a session of its own."""

    url: str
    pid: int
    log: Path

    def kill(self) -> None:
        """kill -9 of the server and all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait_until_healthy(self) -> Self:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health", timeout=2.0, trust_env=False).is_success:
                    return self
            if not Path(f"/proc/{self.pid}").exists():
                break
            time.sleep(0.1)
        raise RuntimeError(f"{self.url} did not get healthy:\n{self.log.read_text()[-3000:]}")


class Farm:
    """Starts servers in a second or two each; all end with it."""

    def __init__(self, folder: Path) -> None:
        if not PYTHON.is_file():
            raise RuntimeError(f"{PYTHON} not found: run `make sglang-env` (make test-sglang does)")
        self._folder = folder
        with open(folder / "farm.err", "w") as errors:
            self._process = subprocess.Popen(
                [PYTHON, "-m", "sglang_cpu.farm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment("cpu", threads=1),
            )
        if self._answer() != "ready":
            raise RuntimeError((folder / "farm.err").read_text()[-3000:])

    def start(
        self,
        model: Path,
        port: int | None = None,
        **flags: str | int | bool,
    ) -> RealServer:
        """A server of the model in a folder; ask `wait_until_healthy` of it."""
        port = port or free_port()
        named = {name.replace("_", "-"): value for name, value in flags.items()}
        chosen: Flags = {"model-path": str(model), "port": port, "dtype": "float32", "random-seed": 0}
        log = self._folder / f"{port}.log"
        request = {
            "argv": arguments(ON_CPU | chosen | {"grammar-backend": "none"} | named),
            "log": str(log),
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return RealServer(f"http://127.0.0.1:{port}", int(self._answer()), log)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def arguments(flags: Flags) -> Sequence[str]:
    """As they stand on a command line."""
    words: list[str] = []
    for name, value in flags.items():
        if value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words
