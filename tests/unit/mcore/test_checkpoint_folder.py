"""Checkpoint folders without any model: what counts as complete, what is kept, what is reported."""

import json
import subprocess
from pathlib import Path

import pytest

from megatron_troll.mcore.checkpoint_folder import (
    MANIFEST,
    CheckpointError,
    discard,
    draft,
    path_of,
    publish,
    read,
    retain,
    steps,
)
from megatron_troll.mcore.checkpoint_sums import SUMS, SumsError, check_sums, read_sums, summing, sums_of


def save(folder: Path, step: int, score: float | None = None) -> None:
    written = draft(folder, step)
    (written / "tensors").mkdir()
    (written / "tensors" / "shard").write_bytes(b"x" * step)
    publish(written, path_of(folder, step), {"step": step, "score": score})


def test_steps_are_numbers_of_complete_folders(tmp_path: Path) -> None:
    assert steps(tmp_path / "absent") == []
    for step in (10, 2, 1_000_000):
        save(tmp_path, step)
    draft(tmp_path, 11)
    (tmp_path / "step_000012").write_text("a file")
    (tmp_path / "step_x").mkdir()
    assert steps(tmp_path) == [2, 10, 1_000_000]


def test_a_draft_sweeps_what_kills_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    first = draft(tmp_path, 2)
    (first / "half").write_text("")
    second = draft(tmp_path, 2)
    assert second != first
    assert sorted(tmp_path.iterdir()) == sorted([path_of(tmp_path, 1), second])


def test_the_manifest_lists_every_file_in_its_size(tmp_path: Path) -> None:
    save(tmp_path, 3, score=0.5)
    listed = {"files": {"tensors/shard": 3}, "sums": "SHA256SUMS"}
    assert read(tmp_path) == {"format": 2, "step": 3, "score": 0.5, **listed}


def test_every_file_is_summed_as_sha256sum_does(tmp_path: Path) -> None:
    save(tmp_path, 3)
    checked = subprocess.check_output(["sha256sum", "-c", SUMS], cwd=path_of(tmp_path, 3), text=True)
    assert checked == "checkpoint.json: OK\ntensors/shard: OK\n"


def test_sums_of_writers_are_used_and_their_files_removed(tmp_path: Path) -> None:
    written = draft(tmp_path, 1)
    (written / "tensors").mkdir()
    names = ["tensors/__0_0.distcp", "tensors/__0_1.distcp", "tensors/__1_0.distcp"]

    def write(rank: int, said: str) -> str:
        for name in names:
            if f"__{rank}_" in name:
                (written / name).write_text(said)
        return said

    assert summing(write, written, 0)(0, said="here") == "here"
    summing(write, written, 1)(1, "there")
    (written / names[0]).write_text("!!!!")  # after it was summed: nobody reads it again
    publish(written, path_of(tmp_path, 1), {"step": 1})
    step = path_of(tmp_path, 1)
    assert [path.name for path in step.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(SumsError, match=f"^{step / names[0]}: not as {step / SUMS} says"):
        check_sums(step, read_sums(step) or {}, names)
    check_sums(step, read_sums(step) or {}, names[1:])


def test_ranks_share_the_files(tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"{i}").write_bytes(bytes(i))
    names = [f"{i}" for i in range(5)]
    sums = sums_of(tmp_path, names) | {"1": "0" * 64}
    shares = [caught for rank in range(2) if (caught := differing(tmp_path, sums, names, rank))]
    assert len(shares) == 1
    assert str(tmp_path / "1") in shares[0]


def differing(folder: Path, sums: dict[str, str], names: list[str], rank: int) -> str:
    try:
        check_sums(folder, sums, names, rank, 2)
    except SumsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("content", ["x  y\n", "0" * 64 + "\n", "\udcff"])
def test_sums_that_are_none_are_named(content: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    (path_of(tmp_path, 1) / SUMS).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"SHA256SUMS.*: the checkpoint is damaged"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "kept"),
    [(2, True, [2, 4, 5]), (2, False, [4, 5]), (1, True, [2, 5]), (9, False, [1, 2, 3, 4, 5])],
)
def test_retention(keep_last: int, keep_best: bool, kept: list[int], tmp_path: Path) -> None:
    for step, score in ((1, 0.9), (2, 0.9), (3, None), (4, 0.1), (5, 0.2)):
        save(tmp_path, step, score)
    retain(tmp_path, keep_last, keep_best)
    assert steps(tmp_path) == kept
    assert len(list(tmp_path.iterdir())) == len(kept)


def test_a_damaged_checkpoint_has_no_score(tmp_path: Path) -> None:
    for step, score in ((1, 0.9), (2, 0.5), (3, 0.1)):
        save(tmp_path, step, score)
    (path_of(tmp_path, 1) / "tensors" / "shard").unlink()
    retain(tmp_path, keep_last=1, keep_best=True)
    assert steps(tmp_path) == [2, 3]


def test_a_discarded_step_is_no_longer_there(tmp_path: Path) -> None:
    save(tmp_path, 1)
    discard(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [None, 0, 3])
def test_a_missing_cut_or_longer_file_is_reported(size: int | None, tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    shard = path_of(tmp_path, 2) / "tensors" / "shard"
    shard.unlink()
    if size is not None:
        shard.write_bytes(b"x" * size)
    expected = "is missing" if size is None else f"has {size} bytes instead of 2"
    with pytest.raises(CheckpointError, match=f"{shard} {expected}.*usable steps: 1 ") as caught:
        read(tmp_path)
    assert "delete the folders of later steps to resume" in str(caught.value)


def test_nothing_usable_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no complete checkpoint in"):
        read(tmp_path)
    save(tmp_path, 1)
    (path_of(tmp_path, 1) / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot be read.*no other step in .* is usable"):
        read(tmp_path)


def test_another_format_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    manifest = path_of(tmp_path, 1) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 3}))
    with pytest.raises(CheckpointError, match="has format 3, this version reads 2"):
        read(tmp_path, 1)
