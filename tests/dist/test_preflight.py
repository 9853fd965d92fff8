"""Checks between nodes, each of which is a process here."""

import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_troll.parallel.groups import Group
from megatron_troll.preflight import together
from megatron_troll.preflight.finding import Finding
from tests.dist.harness import RankPool


def world() -> Group:
    return Group(dist.group.WORLD, dist.get_rank(), dist.get_world_size())


def check_folder(folders: list[Path]) -> Finding:
    with mock.patch.object(together, "SEEN_WITHIN_S", 0.3):
        return together.shared_folder(world(), folders[dist.get_rank()])


def check_clock(offset: float) -> Finding:
    now = time.time
    with mock.patch.object(time, "time", side_effect=lambda: now() + offset * dist.get_rank()):
        return together.clock(world())


def check_all_reduce() -> list[Finding]:
    return list(together.all_reduce(world(), torch.device("cpu"), "lo"))


def test_a_folder_that_all_see(ranks2: RankPool, tmp_path: Path) -> None:
    found = ranks2.run(check_folder, [tmp_path, tmp_path])
    assert [finding.level for finding in found] == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_only_rank_0_has(ranks2: RankPool, tmp_path: Path) -> None:
    first, second = ranks2.run(check_folder, [tmp_path, tmp_path / "local"])
    assert first.level == "ok"
    assert second.level == "failed"
    assert f"{tmp_path / 'local'}: rank 0's file is not seen here within 0.3 s" in second.text


@pytest.mark.parametrize(("offset", "level"), [(0.0, "ok"), (-90.0, "failed")])
def test_clocks(ranks2: RankPool, offset: float, level: str) -> None:
    first, second = ranks2.run(check_clock, offset)
    assert (first.level, second.level) == ("ok", level)
    if level == "failed":
        assert float(second.text.split()[0]) == pytest.approx(-90.0, abs=1.0)


def test_the_all_reduce_says_how_fast(ranks2: RankPool) -> None:
    ((first,), second) = ranks2.run(check_all_reduce)
    assert (first.check, first.level) == ("all-reduce", "ok")
    assert first.text.startswith("2 ranks, ")
    assert first.text.endswith(" GB/s over lo")
    assert second == []
