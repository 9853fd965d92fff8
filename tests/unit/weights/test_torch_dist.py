"""Distributed checkpoints without Megatron: torch reads what is written, and what torch writes is read."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_troll.weights.megatron_keys import Region
from megatron_troll.weights.torch_dist import (
    METADATA,
    Chunk,
    SavedTensor,
    SavedTensors,
    TensorsError,
    write_chunk,
    write_index,
)

WHOLE = torch.arange(24.0).reshape(4, 6)
# In rows 0, 1 to 2 and 3, of which the second lies in two halves.
PIECES = [((0, 0), (1, 6)), ((1, 0), (2, 3)), ((1, 3), (2, 3)), ((3, 0), (1, 6))]


def write(folder: Path, pieces: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    chunks = []
    for i, (start, shape) in enumerate(pieces):
        with open(folder / f"{i % 2}.distcp", "ab") as file:
            where = write_chunk(file, block(start, shape))
        chunks.append(Chunk(start, shape, f"{i % 2}.distcp", *where))
    write_index(folder, {"w": SavedTensor(WHOLE.dtype, tuple(WHOLE.shape), tuple(chunks))})


def block(start: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    return WHOLE[start[0] : start[0] + shape[0], start[1] : start[1] + shape[1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, PIECES)
    return tmp_path


def test_torch_reads_what_is_written(folder: Path) -> None:
    state = {"w": torch.zeros_like(WHOLE)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    assert torch.equal(state["w"], WHOLE)


def test_what_torch_writes_is_read(tmp_path: Path) -> None:
    transposed = torch.arange(6).to(torch.bfloat16).reshape(2, 3).T
    dcp.save({"w": WHOLE, "t": transposed}, checkpoint_id=tmp_path, no_dist=True)
    there = SavedTensors(tmp_path)
    assert {key: (saved.dtype, saved.shape) for key, saved in there.tensors.items()} == {
        "t": (torch.bfloat16, (3, 2)),
        "w": (torch.float32, (4, 6)),
    }
    assert torch.equal(there.read(Region("w", (4, 6), (0, 0), (4, 6))), WHOLE)
    assert torch.equal(there.read(Region("t", (3, 2), (0, 0), (3, 2))), transposed)


@pytest.mark.parametrize("rows", [(0, 4), (0, 1), (1, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("columns", [(0, 6), (2, 2), (3, 3)])
def test_any_region_is_put_together_from_its_chunks(
    rows: tuple[int, int], columns: tuple[int, int], folder: Path
) -> None:
    (top, height), (left, width) = rows, columns
    region = Region("w", (4, 6), (top, left), (height, width))
    assert torch.equal(SavedTensors(folder).read(region), block((top, left), (height, width)))


def test_a_view_is_written_without_the_rest_of_its_memory(tmp_path: Path) -> None:
    with open(tmp_path / "f", "wb") as file:
        _, length = write_chunk(file, torch.zeros(1000, 1000)[:2])
    assert length < 10_000


def test_everything_that_is_missing_or_cut_short_is_listed(tmp_path: Path) -> None:
    write(tmp_path, PIECES[:3])
    os.truncate(tmp_path / "0.distcp", 100)
    (tmp_path / "1.distcp").unlink()
    with pytest.raises(TensorsError) as caught:
        SavedTensors(tmp_path)
    cut, missing, incomplete = str(caught.value).splitlines()
    assert cut.startswith(f"cut short: {tmp_path / '0.distcp'}, 100 bytes of at least")
    assert missing == f"missing: {tmp_path / '1.distcp'}"
    assert incomplete == "incomplete: w (4, 6): its chunks hold 18 of 24 elements"


def garbage(folder: Path) -> None:
    (folder / "0.distcp").write_bytes(bytes((folder / "0.distcp").stat().st_size))


def other_tensor(folder: Path) -> None:
    """The chunks of a file in another order."""
    content = (folder / "0.distcp").read_bytes()
    half = len(content) // 2
    (folder / "0.distcp").write_bytes(content[half:] + content[:half])


@pytest.mark.parametrize("damage", [garbage, other_tensor])
def test_damage_is_told_with_its_place(damage: Callable[[Path], None], folder: Path) -> None:
    damage(folder)
    with pytest.raises(TensorsError, match=r"0\.distcp is damaged at byte 0"):
        SavedTensors(folder).read(Region("w", (4, 6), (0, 0), (4, 6)))


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_does_more_than_describe_is_not_run(folder: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Evil(folder / "ran")))
    with pytest.raises(TensorsError, match=r"holds posix\.mkdir, which nothing in a checkpoint needs"):
        SavedTensors(folder)
    assert not (folder / "ran").exists()


def test_a_chunk_that_does_more_than_hold_a_tensor_is_not_run(folder: Path) -> None:
    size = (folder / "0.distcp").stat().st_size
    with open(folder / "0.distcp", "wb") as file:
        torch.save(Evil(folder / "ran"), file)
        file.write(bytes(size - file.tell()))
    with pytest.raises(TensorsError, match="damaged at byte 0: it does not hold"):
        SavedTensors(folder).read(Region("w", (4, 6), (0, 0), (4, 6)))
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"nothing", pickle.dumps([1, 2])])
def test_an_index_that_is_none_is_told(content: bytes, folder: Path) -> None:
    (folder / METADATA).write_bytes(content)
    with pytest.raises(TensorsError, match="cannot be read as the index of a checkpoint"):
        SavedTensors(folder)
