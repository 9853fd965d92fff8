"""A folder that survives kills and full disks, is one process's at a time, and appears whole."""

import errno
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_troll.convert.draft import BLOCK_BYTES, HELD_BACK_BYTES, ConversionError, Draft, TargetError
from megatron_troll.convert.plan import Options
from megatron_troll.convert.to_megatron import ToMegatron
from tests.dist.tiny import MOE
from tests.faults import file_size_limit
from tests.unit.convert.kills import SERVER, Convert, kill_at, steps_of
from tests.unit.convert.tiny_folders import (
    SMALL,
    assert_equal,
    read_all,
    run,
    tensors_of,
    to_hugging_face,
    to_megatron,
    write_folder,
)

MOMENTS = 10
Finished = dict[str, tuple[int, int]]


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return tensors_of(MOE)


@pytest.fixture(scope="module")
def folders(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[Convert, Path]:
    """What each direction converts."""
    place = tmp_path_factory.mktemp("sources")
    hugging_face = write_folder(MOE, place / "hf", tensors)
    return {to_megatron: hugging_face, to_hugging_face: to_megatron(hugging_face, place / "mcore")}


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system in memory, where there is one: a kill needs no disk, and flushing costs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("convert", [to_megatron, to_hugging_face])
def test_a_kill_at_any_moment_loses_no_finished_file(
    convert: Convert, folders: dict[Convert, Path], tensors: dict[str, Tensor], in_memory: Path
) -> None:
    steps = steps_of(convert, folders[convert], in_memory / "whole")
    assert_equal(read_all(back(convert, in_memory / "whole")), tensors)
    kept = 0
    for step in random.Random(0).sample(range(1, steps + 1), MOMENTS):
        target = in_memory / str(step)
        kill_at(step, convert, folders[convert], target)
        finished = finished_files(target)
        kept += len(finished)
        convert(folders[convert], target)
        assert finished.items() <= files(target).items()
        assert_same_files(target, in_memory / "whole")
    assert kept > MOMENTS


def back(convert: Convert, target: Path) -> Path:
    """A Hugging Face folder with what is in `target`."""
    if convert is to_hugging_face:
        return target
    return to_hugging_face(target, target.with_name(f"{target.name}-back"))


def finished_files(target: Path) -> Finished:
    """The files with tensors that are under their names, in the draft or in the target."""
    draft = target.with_name(f".{target.name}.part")
    found = files(draft if draft.exists() else target)
    return {name: state for name, state in found.items() if name.endswith((".distcp", ".safetensors"))}


def files(folder: Path) -> Finished:
    """(inode, time of the last change) of every file."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path.relative_to(folder))] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def assert_same_files(one: Path, other: Path) -> None:
    """But for the index of a checkpoint, which torch stamps, and the sums with it."""
    assert files(one).keys() == files(other).keys()
    for name in files(one):
        if name not in ("SHA256SUMS", "tensors/common.pt"):
            assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("convert", [to_megatron, to_hugging_face])
@pytest.mark.parametrize("limit", [300, 5_000, 20_000])
def test_a_full_disk_leaves_nothing_that_looks_whole(
    convert: Convert, limit: int, folders: dict[Convert, Path], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    target = tmp_path / "target"
    with file_size_limit(limit), pytest.raises(ConversionError) as caught:
        convert(folders[convert], target)
    message = str(caught.value)
    assert "File too large" in message
    assert "GiB are free there" in message
    assert f"kept in {tmp_path / '.target.part'}: the same command continues" in message
    assert not target.exists()
    assert finished_files(target) == {}
    convert(folders[convert], target)
    assert_equal(read_all(back(convert, target)), tensors)


@pytest.mark.parametrize("convert", [to_megatron, to_hugging_face])
def test_a_disk_that_loses_what_it_took_is_told_of(
    convert: Convert, folders: dict[Convert, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(file: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("megatron_troll.convert.draft.HELD_BACK_BYTES", 1000)
    monkeypatch.setattr(os, "fdatasync", lost)
    with pytest.raises(ConversionError, match=r"Input/output error .*the same command continues"):
        convert(folders[convert], tmp_path / "target")
    assert finished_files(tmp_path / "target") == {}


def test_large_pieces_are_summed_like_small_ones(in_memory: Path) -> None:
    pieces = [bytes([i]) * size for i, size in enumerate((5, BLOCK_BYTES, HELD_BACK_BYTES, 7))]
    draft = Draft(in_memory / "target", {})
    with draft.open():
        draft.write("a", lambda file: [file.write(piece) for piece in pieces])
        known = draft.known("a")
    assert known is not None
    assert (draft.folder / "a").read_bytes() == b"".join(pieces)
    assert known["sha256"] == hashlib.sha256(b"".join(pieces)).hexdigest()


class FullAtTheEnd(ToMegatron):
    """A disk that has room for the files with tensors, and none for the index."""

    def complete(self, folder: Path, records: dict[str, Any]) -> None:
        with file_size_limit(1000):
            super().complete(folder, records)


def test_a_disk_that_fills_at_the_very_end_keeps_all_files_with_tensors(
    folders: dict[Convert, Path], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    source, target = folders[to_megatron], tmp_path / "target"
    conversion = FullAtTheEnd(source, SMALL)
    with pytest.raises(ConversionError, match=r"writing .*target failed: .*File too large"):
        run(conversion, target)
    assert not target.exists()
    finished = finished_files(target)
    assert finished.keys() == conversion.shards.keys()
    to_megatron(source, target)
    assert finished.items() <= files(target).items()
    assert_equal(read_all(back(to_megatron, target)), tensors)


def test_too_little_space_is_told_before_anything_is_written(
    folders: dict[Convert, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 100_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(TargetError, match=r"needs 0\.0 GiB more and 0\.0 GiB are free there: make room"):
        to_megatron(folders[to_megatron], tmp_path / "target")
    assert finished_files(tmp_path / "target") == {}


def test_a_target_that_is_there_is_left_alone(folders: dict[Convert, Path], tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "thesis.txt").write_text("")
    with pytest.raises(TargetError, match="target is not empty: choose another folder, or delete it"):
        to_megatron(folders[to_megatron], target)
    with pytest.raises(TargetError, match="is not empty"):
        to_megatron(folders[to_megatron], target / "thesis.txt")
    with pytest.raises(TargetError, match="is not empty"):
        to_megatron(folders[to_megatron], folders[to_megatron])
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "thesis.txt"]


def test_a_target_that_cannot_be_replaced_is_refused_at_the_start(
    folders: dict[Convert, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(TargetError, match="link is a link: give the folder itself"):
        to_megatron(folders[to_megatron], tmp_path / "link")
    with pytest.raises(TargetError, match="is the root of a file system"):
        to_megatron(folders[to_megatron], Path("/dev/shm"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "link"]


def test_the_working_folder_may_be_the_target(
    folders: dict[Convert, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    to_megatron(folders[to_megatron], Path())
    assert (tmp_path / "empty" / "config.json").is_file()


@pytest.mark.parametrize("damage", ["", "[]", "{", "\x00"])
def test_what_is_damaged_in_a_draft_is_told_or_made_again(damage: str, tmp_path: Path) -> None:
    draft = Draft(tmp_path / "target", {})
    with draft.open():
        draft.write("a", lambda file: file.write(b"abc"))
    (draft.folder / "records" / "a.json").write_text(damage)
    assert draft.known("a") is None
    (draft.folder / "conversion.json").write_text(damage)
    with pytest.raises(TargetError, match=f"conversion.json .*: delete {draft.folder}"), draft.open():
        pass


def test_an_empty_target_is_taken_and_a_finished_one_is_not_made_again(
    folders: dict[Convert, Path], tmp_path: Path
) -> None:
    target, source = tmp_path / "target", folders[to_megatron]
    target.mkdir()
    assert run(ToMegatron(source, SMALL), target)
    before = files(target)
    assert not run(ToMegatron(source, SMALL), target)
    assert files(target) == before
    with pytest.raises(TargetError, match="is not empty"):
        run(ToMegatron(source, Options(shard_bytes=200_000)), target)


def test_a_draft_of_something_else_is_not_continued(folders: dict[Convert, Path], tmp_path: Path) -> None:
    target, source = tmp_path / "target", folders[to_megatron]
    with file_size_limit(60_000), pytest.raises(ConversionError):
        to_megatron(source, target)
    with pytest.raises(TargetError, match=r"unfinished conversion that differs in shard_bytes: finish it"):
        run(ToMegatron(source, Options(shard_bytes=200_000)), target)


def test_two_processes_do_not_write_one_target(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "target", {"a": 1})
    with draft.open():
        process = SERVER.Process(target=open_refused, args=(draft,))
        process.start()
        process.join()
        assert process.exitcode == 0


def open_refused(draft: Draft) -> None:
    with pytest.raises(TargetError, match="is being written by another process"), draft.open():
        pass


def test_a_finished_file_that_changed_since_is_written_again(
    folders: dict[Convert, Path], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    target, source = tmp_path / "target", folders[to_megatron]
    with file_size_limit(60_000), pytest.raises(ConversionError):
        to_megatron(source, target)
    shard = next((tmp_path / ".target.part" / "tensors").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[-len(content) // 3] ^= 1
    shard.write_bytes(content)
    to_megatron(source, target)
    assert_equal(read_all(back(to_megatron, target)), tensors)


def test_a_finished_file_of_another_size_is_written_again(tmp_path: Path) -> None:
    draft = Draft(tmp_path / "target", {})
    with draft.open():
        draft.write("a", lambda file: file.write(b"abc"))
        assert draft.known("a") == {
            "bytes": 3,
            "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "record": 3,
        }
        (draft.folder / "a").write_bytes(b"ab")
        assert draft.known("a") is None
        assert draft.known("b") is None
        assert not draft.is_whole("b")
        (draft.folder / "a").write_bytes(b"abd")
        assert draft.known("a") is not None
        assert not draft.is_whole("a")
        (draft.folder / "a").write_bytes(b"abc")
        assert draft.is_whole("a")
    assert json.loads((draft.folder / "conversion.json").read_text()) == {}
