"""Checks for a job's SGLang servers: an interpreter with SGLang, free ports, scales of an FP8 cache."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_troll.config import Config, ConfigError
from megatron_troll.launch.servers import interpreter, refusal
from megatron_troll.launch.sglang_flags import SGLANG, kv_cache
from megatron_troll.mcore.shape import read_shape
from megatron_troll.preflight.finding import Finding, failed, passed, warned

ASK = "from importlib.metadata import version; print(version('sglang'))"
ASK_S = 120.0
KV_SCALES = "kv scales"


@dataclass(frozen=True)
class NodeServers:
    """The servers of one node: `python` runs SGLang, `host` is the address they listen on."""

    python: str
    host: str
    ports: tuple[int, ...]


def servers_of(config: Config, host: str) -> NodeServers:
    """The servers that `mtroll serve` starts on one node, with every port that the configuration fixes."""
    serve = config.serve
    own = (value for name, value in serve.flags.items() if name.replace("_", "-").endswith("-port"))
    ports = (*range(serve.port, serve.port + serve.servers), *(port for port in own if type(port) is int))
    return NodeServers(serve.python, host, ports)


def findings(servers: NodeServers) -> Iterator[Finding]:
    yield sglang(servers.python)
    yield ports(servers.host, servers.ports)


def sglang(python: str) -> Finding:
    """Ask an interpreter, which may be of another environment, for its SGLang version."""
    try:
        command = [str(interpreter(python)), "-c", ASK]
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S)
    except (ConfigError, OSError, subprocess.TimeoutExpired) as error:
        return failed("sglang", str(error), "set serve.python to an interpreter that has SGLang")
    if done.returncode:
        return failed(
            "sglang",
            f"{python} has no SGLang: {done.stderr.strip().splitlines()[-1:]}",
            f"install SGLang {SGLANG} there, or set serve.python",
        )
    found = done.stdout.strip()
    if found != SGLANG:
        return warned("sglang", found, f"the tested version is {SGLANG}")
    return passed("sglang", found)


def ports(host: str, wanted: tuple[int, ...]) -> Finding:
    """Check the ports that servers will listen on, by binding each for a moment."""
    refusals = {port: refusal(host, port) for port in wanted}
    taken = [f"{port}: {why}" for port, why in refusals.items() if why]
    if taken:
        return failed(
            "ports",
            f"{host} {', '.join(taken)}",
            f"end what listens there (ss -ltnp), or set serve.port: {len(wanted)} in a row are needed",
        )
    return passed("ports", f"free: {', '.join(map(str, wanted))}")


def scales(config: Config) -> Iterator[Finding]:
    """Check the scales of an FP8 KV cache; yields nothing for another cache."""
    if config.rollout.kv_cache == "auto":
        return
    file = config.serve.kv_scales
    try:
        kv_cache(config, read_shape(config.models.drawing.path))
    except ConfigError as error:
        yield failed(KV_SCALES, str(error), "the run would be refused by its servers")
        return
    if file is None:
        yield warned(KV_SCALES, "none: every scale is 1", "calibrate: tools/calibrate_fp8_kv.py")
    else:
        yield passed(KV_SCALES, f"{file}: one for each layer and rank")
