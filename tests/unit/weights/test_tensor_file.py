"""Safetensors files: read as the library writes them, written as it reads them, and refused when broken."""

import io
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_troll.weights.tensor_file import (
    DTYPES,
    TensorFileError,
    TensorFileWriter,
    read_header,
    read_tensor,
)

TENSORS = {
    "wide": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "scalar": torch.tensor(7.0),
    "half": torch.arange(5).to(torch.bfloat16),
    "odd": torch.arange(3, dtype=torch.uint8),
    "empty": torch.zeros(0, 4, dtype=torch.uint8),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 300 bytes or so that the library wrote."""
    save_file(TENSORS, tmp_path / "a.safetensors", {"note": "kept aside"})
    return tmp_path / "a.safetensors"


def read(path: Path, name: str, index: int | None = None) -> Tensor:
    with open(path, "rb") as file:
        return read_tensor(file.fileno(), read_header(path)[name], index)


def test_what_the_library_writes_is_read(path: Path) -> None:
    assert read_header(path).keys() == TENSORS.keys()
    assert all(torch.equal(read(path, name), tensor) for name, tensor in TENSORS.items())
    assert torch.equal(read(path, "wide", 1), TENSORS["wide"][1])


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    with open(tmp_path / "a.safetensors", "wb") as file:
        writer = TensorFileWriter(file, {name: (t.dtype, tuple(t.shape)) for name, t in TENSORS.items()})
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    there = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(there[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.tensor([0, 1, 1, 0]).to(dtype)
    save_file({"t": tensor}, tmp_path / "a.safetensors")
    assert read_header(tmp_path / "a.safetensors")["t"].dtype == dtype
    assert torch.equal(read(tmp_path / "a.safetensors", "t").float(), tensor.float())


def test_tensors_come_in_the_order_and_form_that_was_announced() -> None:
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    for name, tensor in (("b", torch.zeros(3)), ("a", torch.zeros(3)), ("a", torch.zeros(2).half())):
        with pytest.raises(AssertionError):
            TensorFileWriter(io.BytesIO(), layout).write(name, tensor)
    with pytest.raises(AssertionError, match="size of their elements"):
        TensorFileWriter(io.BytesIO(), {"a": (torch.bfloat16, (2,)), "b": (torch.float32, (3,))})


@pytest.mark.parametrize("length", [0, 5, 8, 30, -1])
def test_a_file_cut_anywhere_is_told(length: int, path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:length])
    with pytest.raises(TensorFileError, match=f"{path} is cut short"):
        read_header(path)


def test_surplus_bytes_are_told(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(TensorFileError, match="longer than its header says"):
        read_header(path)


def zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (zipped(), "a pickled PyTorch file; save it as safetensors"),
        (pickle.dumps({"w": [0] * 10}), "a pickle; save it as safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer.*git lfs pull"),
        (b"<!doctype html><html>", "a web page"),
        (b"nothing of the kind", "not a safetensors file"),
    ],
    ids=["torch", "pickle", "lfs", "html", "text"],
)
def test_other_files_are_named_for_what_they_are(content: bytes, what: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(TensorFileError, match=f"a.safetensors is {what}"):
        read_header(tmp_path / "a.safetensors")


def with_header(path: Path, header: str, data: bytes = bytes(8)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data)
    return path


FOUR = '"dtype":"F32","shape":[1],"data_offsets"'


@pytest.mark.parametrize(
    ("header", "what"),
    [
        ("{", "is not a safetensors file: its header cannot be read"),
        ("{" * 100_000, "is not a safetensors file: its header cannot be read"),
        ('{"t":{"dtype":"F32"}}', "its header describes 't' without dtype, shape and data_offsets"),
        ('{"t":7}', "its header describes 't' without dtype, shape and data_offsets"),
        (
            '{"t":{"dtype":"F4","shape":[1],"data_offsets":[0,8]}}',
            "'t' has dtype 'F4', which is not supported: use .* that it was made from$",
        ),
        ('{"t":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}', r"'t' has shape \[-2\]"),
        ('{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}', "'t', F32 .* said to be at bytes 0 to 8"),
        (f'{{"t":{{{FOUR}:[-4,0]}}}}', "said to be at bytes -4 to 0"),
        (f'{{"t":{{{FOUR}:[0,4]}},"t":{{{FOUR}:[4,8]}}}}', "its header names 't' twice"),
        (
            f'{{"t":{{{FOUR}:[0,4]}},"u":{{{FOUR}:[2,6]}}}}',
            "'u', which begins at byte 2, overlaps 't', .* at 4",
        ),
        (f'{{"t":{{{FOUR}:[4,8]}}}}', "'t', which begins at byte 4, leaves a gap after the header"),
        (f'{{"t":{{{FOUR}:[0,4]}},"u":{{{FOUR}:[4,8]}},"v":{{{FOUR}:[8,12]}}}}', "cut short: .* expected"),
    ],
)
def test_a_header_that_makes_no_sense_is_told(header: str, what: str, tmp_path: Path) -> None:
    path = with_header(tmp_path / "a.safetensors", header)
    with pytest.raises(TensorFileError, match=what) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_header_beyond_the_limit_of_the_format_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with open(path, "wb") as file:
        file.write((2 * 10**8).to_bytes(8, "little") + b"{")
        file.truncate(3 * 10**8)
    with pytest.raises(TensorFileError, match="a header of 200000000 bytes"):
        read_header(path)
