"""Each node chooses its own interface and adapters."""

from pathlib import Path

import pytest

from megatron_troll.launch.slurm.network import (
    address_of,
    environment,
    fabric,
    interface_with,
)
from megatron_troll.system import address_towards


def adapter(root: Path, name: str, state: str, rate: str) -> None:
    port = root / name / "ports" / "1"
    port.mkdir(parents=True)
    (port / "state").write_text(f"{state}\n")
    (port / "rate").write_text(f"{rate}\n")


def test_the_interface_is_the_one_on_the_route() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_with("127.0.0.1") == "lo"
    assert address_of("lo") == "127.0.0.1"


def test_what_is_not_there_is_named_beside_what_is() -> None:
    with pytest.raises(ValueError, match=r"no interface 'ib9' .* there are \[.*'lo'"):
        address_of("ib9")
    with pytest.raises(ValueError, match=r"no interface here has the address 192\.0\.2\.1"):
        interface_with("192.0.2.1")


def test_adapters_that_are_down_or_slower_are_left_out(tmp_path: Path) -> None:
    adapter(tmp_path, "mlx5_0", "4: ACTIVE", "400 Gb/sec (4X NDR)")
    adapter(tmp_path, "mlx5_1", "1: DOWN", "400 Gb/sec (4X NDR)")
    adapter(tmp_path, "mlx5_2", "4: ACTIVE", "25 Gb/sec (1X EDR)")
    adapter(tmp_path, "mlx5_10", "4: ACTIVE", "400 Gb/sec (4X NDR)")
    assert fabric(tmp_path) == ["mlx5_0", "mlx5_10"]
    assert environment("eth0", {}, tmp_path) == {
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "=mlx5_0,mlx5_10",
    }


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    given = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "ib0"}
    assert environment("eth0", given, tmp_path / "none") == {}
