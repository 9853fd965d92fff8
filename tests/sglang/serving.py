"""What tests do to real servers, and a router in front of them."""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from megatron_troll.config import SGLang
from megatron_troll.launch.ports import free_port
from megatron_troll.launch.servers import environment
from megatron_troll.rollout.sglang.client import NamedRequest
from tests.sglang.asking import VERSIONS, Asked, Asking
from tests.sglang.farm import PYTHON, START_S, RealServer
from tests.sglang.model import VOCAB
from tests.sglang.recordings import GREEDY, NEVER, PROMPT, Endless

TOP_K = 8


def tell(server: RealServer, path: str, **body: Any) -> Any:
    """POST; the JSON of the answer."""
    reply = httpx.post(f"{server.url}{path}", json=body, timeout=60.0, trust_env=False).raise_for_status()
    return reply.json() if reply.content else None


def give(servers: Sequence[RealServer], folder: Path, version: int = 1) -> None:
    """The weights of a folder, under the name that this run has for them."""
    for server in servers:
        tell(
            server,
            "/update_weights_from_disk",
            model_path=str(folder),
            weight_version=VERSIONS.called(version),
        )


@contextmanager
def slow(server: RealServer, seconds: float) -> Iterator[None]:
    """Each of its forwards takes so much longer."""
    tell(server, "/slow_down", forward_sleep_time=seconds)
    try:
        yield
    finally:
        tell(server, "/slow_down", forward_sleep_time=None)


def question(number: int, length: int, prompt: Sequence[int] = PROMPT) -> NamedRequest:
    """Drawn greedily, so that any server with the same weights gives the same; the prompt is its own."""
    ids = [*prompt, 5 + number % 50]
    return NamedRequest(f"p{number}#0", Endless(ids, length, GREEDY, NEVER, TOP_K, VOCAB, seed=1))


def questions(count: int, length: int) -> list[NamedRequest]:
    """Of up to `length` tokens: they do not end together."""
    return [question(i, length // 2 + i * 7 % (length // 2) + 1) for i in range(count)]


def asking(servers: Sequence[RealServer], **config: Any) -> Asking:
    urls = [server.url for server in servers]
    return Asking(lambda: urls, SGLang(**config))


def assert_each_once(asked: Asked, calm: Asked) -> None:
    """As on a quiet day: every question answered, once, with the same tokens and records."""
    assert asked.times == dict.fromkeys(calm.answers, 1)
    for i, expected in calm.answers.items():
        answer = asked.answers[i]
        assert answer.ids.tolist() == expected.ids.tolist()
        assert abs(answer.logp - expected.logp).max() < 1e-4
        assert answer.topk is not None
        assert answer.topk.ids.shape == (len(answer.ids), TOP_K)
        assert set(answer.versions.tolist()) == {1}


@contextmanager
def routed(log: Path) -> Iterator[str]:
    """The URL of a sglang-router without workers."""
    port = free_port()
    argv = [PYTHON, "-m", "sglang_cpu.route", "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--prometheus-port", str(free_port()), "--policy", "round_robin"]
    with open(log, "w") as output:
        router = subprocess.Popen(argv, env=environment("cpu", 1), stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/workers", router, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        router.terminate()
        with suppress(subprocess.TimeoutExpired):
            router.wait(5.0)
        router.kill()
        router.wait()


def _wait_for(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=2.0, trust_env=False).is_success:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} does not answer:\n{log.read_text()[-3000:]}")
