"""Which servers a run has, what its weights are called, and its key."""

import asyncio
import json
import os
import subprocess
from pathlib import Path

import pytest

from megatron_troll.config import Config, ConfigError, RolloutConfig, RunPaths
from megatron_troll.rollout.sglang.http import Http, WrongServer, read_key
from megatron_troll.rollout.sglang.registry import Registry, key_of, register, unregister
from megatron_troll.rollout.sglang.wire import Versions


def test_servers_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    assert Registry(folder).urls() == ()
    for port in (30001, 30000):
        register(folder, f"http://10.0.0.1:{port}", os.getpid())
    register(folder, "http://[::1]:30000", os.getpid())
    assert Registry(folder).urls() == ("http://10.0.0.1:30000", "http://10.0.0.1:30001", "http://[::1]:30000")
    for url in ("http://10.0.0.1:30000", "http://10.0.0.1:30000", "http://[::1]:30000"):
        unregister(folder, url)
    assert Registry(folder).urls() == ("http://10.0.0.1:30001",)


NO_URLS = ("7", "null", '"a:1"', '"http://[::1"', '"http://a:70000"', '"http://a\\u0000:1"', '"http://"')
DAMAGED = ("{", "", "[]", "null", "3", '"x"', "{}", "\udcff", "[" * 10**5)


@pytest.mark.parametrize(
    "content",
    [*DAMAGED, *(f'{{"url": {url}}}' for url in NO_URLS)],
    ids=lambda content: ascii(content[:30]),
)
def test_a_damaged_registration_is_skipped_and_said_once(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    register(tmp_path, "http://10.0.0.1:30000", os.getpid())
    (tmp_path / "damaged.json").write_bytes(content.encode(errors="surrogateescape"))
    registry = Registry(tmp_path)
    assert registry.urls() == registry.urls() == ("http://10.0.0.1:30000",)
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path / 'damaged.json'} names no server")


def test_a_server_whose_process_ended_here_is_not_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever listens at its port now would be sent the key."""
    with subprocess.Popen(["sleep", "60"]) as process:
        register(tmp_path, "http://127.0.0.1:30000", process.pid)
        registry = Registry(tmp_path)
        assert registry.urls() == ("http://127.0.0.1:30000",)
        process.kill()
    assert registry.urls() == registry.urls() == ()
    (said,) = caplog.messages
    assert f"process {process.pid} of this machine has ended" in said


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    register(tmp_path, "http://127.0.0.1:30000", os.getpid())
    (file,) = tmp_path.iterdir()
    entry = json.loads(file.read_text())
    file.write_text(json.dumps(entry | {"started": entry["started"] - 1}))
    assert Registry(tmp_path).urls() == ()


def test_a_server_from_before_the_machine_was_started_again_is_not_asked(tmp_path: Path) -> None:
    register(tmp_path, "http://127.0.0.1:30000", os.getpid())
    (file,) = tmp_path.iterdir()
    entry = json.loads(file.read_text())
    name, _, container = entry["host"]
    file.write_text(json.dumps(entry | {"host": [name, "another start", container]}))
    assert Registry(tmp_path).urls() == ()


@pytest.mark.parametrize("elsewhere", [{"host": ["node2", "boot", "pid:[1]"]}, {"host": None}])
def test_processes_of_other_machines_are_not_judged(tmp_path: Path, elsewhere: dict[str, object]) -> None:
    register(tmp_path, "http://10.0.0.2:30000", os.getpid())
    (file,) = tmp_path.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pid": 2**22 + 1} | elsewhere))
    assert Registry(tmp_path).urls() == ("http://10.0.0.2:30000",)


def test_a_url_that_httpx_rejects_is_a_wrong_server() -> None:
    async def asked() -> None:
        http = Http("secret")
        try:
            await http.get("http://[::1", "/health")
        finally:
            await http.close()

    with pytest.raises(WrongServer, match="no URL of a server"):
        asyncio.run(asked())


def test_a_run_knows_its_own_weights() -> None:
    mine, earlier = Versions("a.run"), Versions("a.run")
    assert mine.number(mine.called(12)) == 12
    assert mine.number(earlier.called(12)) is None
    for other in ("default", "12", mine.run, f"{mine.run}.x"):
        assert mine.number(other) is None


def test_a_key_is_read_from_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("secret\n")
    file.chmod(0o600)
    assert read_key(str(file)) == "secret"
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=r"others may read .*chmod 600"):
        read_key(str(file))
    file.chmod(0o600)
    file.write_text("two words\n")
    with pytest.raises(ConfigError, match="one word") as caught:
        read_key(str(file))
    assert "two words" not in str(caught.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_key(str(tmp_path / "missing"))


def test_a_run_and_its_servers_make_one_key(tmp_path: Path) -> None:
    config = Config.model_construct(name="keyed", runs=str(tmp_path), rollout=RolloutConfig(engine="sglang"))
    key = key_of(config)
    assert len(key) == 64
    assert key_of(config) == key
    assert RunPaths.of(config).key.stat().st_mode & 0o077 == 0
    assert Registry(RunPaths.of(config).servers).urls() == ()
    assert [path.name for path in RunPaths.of(config).servers.iterdir()] == ["key"]
