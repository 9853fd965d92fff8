"""Checkpoints from elsewhere: what would run code is refused before anything of it is read, and so is what a
newer Megatron-Core wrote. What a checkpoint here would run leaves a mark, and does nothing else."""

import io
import json
import pickle
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_troll.mcore.checkpoint_folder import MANIFEST, path_of
from megatron_troll.mcore.checkpoint_pickle import COMMON_OBJECT, read_index
from megatron_troll.mcore.checkpoint_sums import sums_of, write_sums
from tests.dist.checkpoint_run import Run
from tests.dist.harness import RankPool
from tests.dist.test_checkpoint_damage import refused
from tests.dist.test_checkpoint_faults import load_filled, save_filled
from tests.dist.tiny import MOE, reference


@pytest.fixture(scope="module")
def alone() -> Run:
    return Run(dict(reference(MOE).state_dict()), {}, MOE)


@pytest.fixture(scope="module")
def two_steps(alone: Run, ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two-steps")
    ranks1.run(save_filled, alone, str(folder), [(1, None), (2, None)])
    return folder


@pytest.fixture
def folder(two_steps: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 1 and 2, of which the second may be changed."""
    return shutil.copytree(two_steps, tmp_path / "copied")


def leave_mark(folder: str) -> None:
    (Path(folder) / "mark").touch()


class Marking:
    """Leaves a mark in `folder` when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return leave_mark, (self.folder,)


def in_the_index(tensors: Path) -> Path:
    (tensors / ".metadata").write_bytes(pickle.dumps(Marking(tensors)))
    return tensors / ".metadata"


def deep_in_the_index(tensors: Path) -> Path:
    index = read_index(tensors / ".metadata")
    index.planner_data = [Marking(tensors)]
    (tensors / ".metadata").write_bytes(pickle.dumps(index))
    return tensors / ".metadata"


def in_common_state_of_before_0_19(tensors: Path) -> Path:
    torch.save({"args": Marking(tensors)}, tensors / "common.pt")
    return tensors / "common.pt"


def in_common_state(tensors: Path) -> Path:
    return put_object(tensors, COMMON_OBJECT)


def in_place_of_a_weight(tensors: Path) -> Path:
    """With the size of the weight, which Megatron asks for first."""
    return put_object(tensors, "policy.embedding.word_embeddings.weight")


def put_object(tensors: Path, key: str) -> Path:
    """Write an object under `key`; the file that holds it."""
    file, written = tensors / "__9_0.distcp", io.BytesIO()
    torch.save([{"args": Marking(tensors)}], written)
    file.write_bytes(written.getvalue())
    index = read_index(tensors / ".metadata")
    there, entry = index.state_dict_metadata[key], BytesStorageMetadata()
    vars(entry)["size"] = getattr(there, "size", None)
    index.state_dict_metadata[key] = entry
    index.storage_data[MetadataIndex(key)] = _StorageInfo(file.name, 0, len(written.getvalue()))
    (tensors / ".metadata").write_bytes(pickle.dumps(index))
    return file


def rewrite(step: Path, **changes: Any) -> None:
    """Change the manifest, in which all files have the size that they have, and sum everything again."""
    manifest = json.loads((step / MANIFEST).read_text())
    manifest["files"] = {name: (step / name).stat().st_size for name in manifest["files"]}
    (step / MANIFEST).write_text(json.dumps(manifest | changes))
    write_sums(step, sums_of(step, [MANIFEST, *manifest["files"]]))


@pytest.mark.parametrize(
    "put",
    [
        in_the_index,
        deep_in_the_index,
        in_common_state_of_before_0_19,
        in_common_state,
        in_place_of_a_weight,
    ],
)
def test_a_checkpoint_that_would_run_code_is_refused_and_runs_nothing(
    put: Callable[[Path], Path], alone: Run, folder: Path, ranks1: RankPool
) -> None:
    tensors = path_of(folder, 2) / "tensors"
    file = put(tensors)
    rewrite(path_of(folder, 2))
    (message,) = ranks1.run(refused, alone, str(folder), "policy", "latest")
    assert not (tensors / "mark").exists()
    assert str(file) in message
    assert f"it holds {__name__}.leave_mark, which nothing in a checkpoint needs" in message
    assert ranks1.run(load_filled, alone, str(folder), 1) == [(1, {1.0})]


def test_a_refused_checkpoint_is_an_error_on_every_rank(alone: Run, folder: Path, ranks2: RankPool) -> None:
    file = in_the_index(path_of(folder, 2) / "tensors")
    rewrite(path_of(folder, 2))
    first, second = ranks2.run(refused, Run(alone.weights, {"pp": 2}, MOE), str(folder), "policy", "latest")
    assert str(file) in first
    assert first == second


@pytest.mark.parametrize("newer", ["99.0.0", "99.0.0rc1"])
def test_a_checkpoint_of_a_newer_megatron_is_refused(
    newer: str, alone: Run, folder: Path, ranks1: RankPool
) -> None:
    rewrite(path_of(folder, 2), versions={"megatron-core": newer})
    (message,) = ranks1.run(refused, alone, str(folder), "policy", "latest")
    here = version("megatron-core")
    assert f"was written with megatron-core {newer}, and {here} is installed" in message
    assert "use the release of this program that wrote it" in message
    assert "\n" not in message


@pytest.mark.parametrize("older", ["0.16.1", "0.19.2rc3", "0.19.2+0fd25db"])
def test_a_checkpoint_of_an_older_megatron_is_read(
    older: str, alone: Run, folder: Path, ranks1: RankPool
) -> None:
    torch.save({}, path_of(folder, 2) / "tensors" / "common.pt")
    rewrite(path_of(folder, 2), versions={"megatron-core": older})
    assert ranks1.run(load_filled, alone, str(folder)) == [(2, {2.0})]


def test_a_checkpoint_of_no_megatron_is_refused(alone: Run, folder: Path, ranks1: RankPool) -> None:
    rewrite(path_of(folder, 2), versions={"megatron-core": "newest"})
    (message,) = ranks1.run(refused, alone, str(folder), "policy", "latest")
    assert "names no release of megatron-core that wrote it: Invalid version: 'newest'" in message
