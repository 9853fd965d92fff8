"""What servers need of a node, and which nodes are asked for it."""

import json
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import load
from megatron_troll.launch.plan.build import GIB
from megatron_troll.launch.plan.models import PUBLISHED
from megatron_troll.preflight import serving
from megatron_troll.preflight.needs import needs_of
from megatron_troll.preflight.run import Needs
from tests.dist.tiny import DENSE

EXAMPLES = Path(__file__).parents[3] / "examples" / "configs"
TROLL = "qwen3_30b_a3b_troll.yaml"


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that something listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_port_that_is_taken_is_named(taken: int) -> None:
    finding = serving.ports("127.0.0.1", (taken,))
    assert finding.level == "failed"
    assert f"127.0.0.1 {taken}: " in finding.text
    assert "Address already in use" in finding.text
    assert "set serve.port" in finding.advice


def test_a_port_of_another_address_is_free(taken: int) -> None:
    finding = serving.ports("127.0.0.2", (taken,))
    assert (finding.level, finding.text) == ("ok", f"free: {taken}")


def test_an_address_that_is_not_here_is_told_as_such() -> None:
    assert "Cannot assign requested address" in serving.ports("192.0.2.1", (30000,)).text


def test_every_port_that_the_configuration_fixes_is_asked() -> None:
    settings = ["serve.port=31000", "serve.servers=3", "serve.flags={nccl_port: 41000, log-level: info}"]
    assert serving.servers_of(load(EXAMPLES / TROLL, settings), "h").ports == (31000, 31001, 31002, 41000)


def test_an_interpreter_without_sglang() -> None:
    finding = serving.sglang(sys.executable)
    assert (finding.level, "sglang" in finding.text) == ("failed", True)
    assert "install SGLang 0.5.23 there" in finding.advice


def test_an_interpreter_that_is_not_there() -> None:
    finding = serving.sglang("/nowhere/python")
    assert (finding.level, finding.check) == ("failed", "sglang")
    assert "/nowhere/python not found" in finding.text


@pytest.mark.parametrize(("said", "level"), [("0.5.23", "ok"), ("0.6.0", "warning")])
def test_the_version_is_that_of_the_servers_own_environment(said: str, level: str, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {said}\n")
    python.chmod(0o755)
    finding = serving.sglang(str(python))
    assert (finding.level, finding.text) == (level, said)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(DENSE))
    return tmp_path


def fp8(dense: Path, *settings: str) -> Config:
    return load(EXAMPLES / TROLL, [f"models.policy.path={dense}", "rollout.kv_cache=fp8_e4m3", *settings])


def test_an_fp8_cache_needs_scales_of_this_model(dense: Path) -> None:
    file = dense / "scales.json"
    (missing,) = serving.scales(fp8(dense, f"serve.kv_scales={file}"))
    assert (missing.check, missing.level) == ("kv scales", "failed")
    assert "No such file or directory; calibrate with tools/calibrate_fp8_kv.py --tp 1" in missing.text
    rows = {0: dict.fromkeys(range(DENSE["num_hidden_layers"]), 0.05)}
    content = {"model_type": "qwen3", "hidden_size": 48, "kv_cache": {"scaling_factor": rows}}
    file.write_text(json.dumps(content))
    (right,) = serving.scales(fp8(dense, f"serve.kv_scales={file}"))
    assert right.level == "ok"
    file.write_text(json.dumps(content | {"hidden_size": 64}))
    (other,) = serving.scales(fp8(dense, f"serve.kv_scales={file}"))
    assert other.level == "failed"


def test_no_scales_are_a_warning_where_they_were_waived_and_nothing_without_fp8(dense: Path) -> None:
    (waived,) = serving.scales(fp8(dense, "serve.force_unscaled_kv=true"))
    assert waived.level == "warning"
    assert list(serving.scales(load(EXAMPLES / TROLL))) == []


def on(rank: int, nodes: int = 2) -> Mapping[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(nodes),
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
        "MASTER_ADDR": "127.0.0.1",
    }


def needs(rank: int, *settings: str, serve_nodes: int = 1) -> Needs:
    path = f"models.policy.path={PUBLISHED / 'Qwen3-30B-A3B'}"
    return needs_of(load(EXAMPLES / TROLL, [path, *settings]), serve_nodes, on(rank))


def test_the_first_nodes_serve_and_the_others_are_held_against_the_plan() -> None:
    first, second = (needs(rank, "launch.device_gib=100", "serve.memory_fraction=0.75") for rank in (0, 1))
    ports = tuple(range(30000, 30008))
    assert first.servers == serving.NodeServers(".venv-sglang/bin/python", "127.0.0.1", ports)
    assert second.servers is None
    assert first.gpu_bytes == 75 * GIB
    assert second.gpu_bytes > 80 * GIB
    assert (first.gpus, second.gpus) == (8, 8)


def test_servers_want_their_gpus() -> None:
    assert needs(0, "serve={servers: 4, tp: 4}").gpus == 16


def test_colocated_servers_are_on_every_node() -> None:
    shared = ("rollout.sglang.colocated=true", "serve.memory_fraction=0.75")
    assert all(needs(rank, *shared, serve_nodes=0).servers for rank in (0, 1))


def test_servers_elsewhere_need_nothing_here() -> None:
    elsewhere = "rollout.sglang.servers=[http://10.0.0.1:30000]"
    assert needs(0, elsewhere, serve_nodes=0).servers is None
    with pytest.raises(ConfigError, match="--serve-nodes 1: the configuration uses no servers of its own"):
        needs(0, elsewhere)
