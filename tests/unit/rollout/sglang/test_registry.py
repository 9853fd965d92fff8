"""Which servers a run has, what its weights are called, and its key."""

from pathlib import Path

import pytest

from megatron_troll.config import Config, ConfigError, RolloutConfig, RunPaths
from megatron_troll.rollout.sglang.http import read_key
from megatron_troll.rollout.sglang.registry import key_of, register, registered, unregister
from megatron_troll.rollout.sglang.wire import Versions


def test_servers_come_and_go(tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    assert registered(folder) == ()
    for port in (30001, 30000):
        register(folder, f"http://10.0.0.1:{port}", pid=1)
    register(folder, "http://[::1]:30000", pid=2)
    (folder / "half.json").write_text("{")
    assert registered(folder) == ("http://10.0.0.1:30000", "http://10.0.0.1:30001", "http://[::1]:30000")
    for url in ("http://10.0.0.1:30000", "http://10.0.0.1:30000", "http://[::1]:30000"):
        unregister(folder, url)
    assert registered(folder) == ("http://10.0.0.1:30001",)


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
    assert registered(RunPaths.of(config).servers) == ()
    assert [path.name for path in RunPaths.of(config).servers.iterdir()] == ["key"]
