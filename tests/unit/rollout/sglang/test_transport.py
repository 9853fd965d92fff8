"""Buckets in memory that servers map, and folders that they read."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import psutil
import torch

from megatron_troll.rollout.sglang.background import Background
from megatron_troll.rollout.sglang.control import Control
from megatron_troll.rollout.sglang.transport import Disk, shared, shared_payload
from megatron_troll.weights.buckets import TensorBucket, allocated, buckets


def moved_by_sending(flat: torch.Tensor) -> bool:
    """Whether there are two copies of a bucket while it is made ready for servers."""
    before = flat.data_ptr()
    shared_payload(TensorBucket((), flat))
    return flat.data_ptr() != before


def test_a_bucket_is_filled_where_servers_map_it() -> None:
    (bucket,) = buckets([("weight", torch.arange(6.0))], 64, shared)
    assert bucket.flat.view(torch.float32).tolist() == list(range(6))
    assert not moved_by_sending(bucket.flat)
    assert moved_by_sending(allocated(64, torch.device("cpu")))


def synced(folder: Path, run: str, version: str) -> None:
    """One sync of a run to `folder`, read by a server that takes whatever it is told."""
    source = folder.with_name("model")
    source.mkdir(exist_ok=True)
    (source / "config.json").write_text(json.dumps({"dtype": "float32"}))
    background, control = Background(), create_autospec(Control, instance=True)
    try:
        disk = Disk(background, control, folder, source, 2**20, run)
        failed = disk.deliver(iter([("weight", torch.ones(2))]), ["http://a:1"], version)
    finally:
        background.close()
    assert failed == {}
    told: Any = control.load.await_args
    assert told.args == ("http://a:1", str(folder / version), version)


def test_a_sync_deletes_what_its_own_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    synced(folder, "/runs/a", "a.01234567.1")
    (folder / "a.01234567.1").rename(folder / ".a.89abcdef.4.part")  # a start that was killed
    synced(folder, "/runs/a", "a.01234567.2")
    assert {path.name for path in folder.iterdir()} == {"a.01234567.2"}
    (folder / "results").mkdir()
    (folder / "results" / "notes.txt").write_text("mine")
    (folder / "a.01234567.0").mkdir()
    (folder / "README").write_text("mine")
    synced(folder, "/other/runs/a", "a.fedcba98.7")
    (folder / "linked").symlink_to(folder / "a.01234567.2", target_is_directory=True)
    others = {path.name for path in folder.iterdir()} - {"a.01234567.2"}
    synced(folder, "/runs/a", "a.01234567.3")
    assert {path.name for path in folder.iterdir()} == {*others, "a.01234567.3"}
    assert (folder / "results" / "notes.txt").read_text() == "mine"


def test_shared_memory_is_held_only_where_it_is_filled() -> None:
    """A bucket is seldom full: the pages behind its last tensor must not be written."""
    size, process = 64 * 2**20, psutil.Process()
    before = process.memory_info().rss
    memory = shared(size, torch.device("cpu"))
    assert memory.is_shared()
    assert process.memory_info().rss - before < size // 8
    memory[: size // 2] = 1
    assert size // 2 <= process.memory_info().rss - before < size * 5 // 8
    assert memory[size // 2 - 1 : size // 2 + 1].tolist() == [1, 0]
