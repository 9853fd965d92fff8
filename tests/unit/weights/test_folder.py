"""Writing a model folder: files, index, config, and what a failure leaves behind."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_troll.weights.folder import FolderWriter, check_target
from megatron_troll.weights.folder_source import FolderSource

CONFIG = {"model_type": "qwen3_moe", "dtype": "bfloat16"}
TENSORS = {name: torch.full((4, 4), float(i)) for i, name in enumerate("dacb")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "notes.txt"):
        (folder / name).write_text(name)
    return folder


def write(folder: Path, source: Path, tensors: dict[str, Any], max_bytes: int = 128) -> None:
    with FolderWriter(folder, source, max_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)


def test_tensors_are_spread_over_files_and_read_back(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "deep" / "export"
    write(folder, source, TENSORS)
    assert sorted(path.name for path in folder.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    written = FolderSource(folder)
    assert all(torch.equal(written.read(name), tensor) for name, tensor in TENSORS.items())
    assert json.loads((folder / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 256},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors",
            "d": "model-00001-of-00002.safetensors",
        },
    }


def test_the_config_names_the_dtype_that_was_written(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "export", source, TENSORS)
    assert json.loads((tmp_path / "export" / "config.json").read_text()) == CONFIG | {"dtype": "float32"}


def test_a_tensor_above_the_limit_has_a_file_of_its_own(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "export", source, TENSORS, max_bytes=1)
    assert len(list((tmp_path / "export").glob("*.safetensors"))) == len(TENSORS)


def test_tensors_that_share_memory_or_change_later_are_copied(tmp_path: Path, source: Path) -> None:
    whole = torch.arange(16.0).reshape(4, 4)
    with FolderWriter(tmp_path / "export", source, 1000) as writer:
        writer.add("columns", whole[:, 1:3])
        writer.add("rows", whole[1:])
        whole.zero_()
    written = FolderSource(tmp_path / "export")
    expected = torch.arange(16.0).reshape(4, 4)
    assert torch.equal(written.read("columns"), expected[:, 1:3])
    assert torch.equal(written.read("rows"), expected[1:])


def test_tensors_of_several_dtypes_are_read_by_the_library(tmp_path: Path, source: Path) -> None:
    tensors = {
        "scale": torch.tensor([1.5], dtype=torch.bfloat16),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "weight": torch.randn(2, 3),
    }
    write(tmp_path / "export", source, tensors, max_bytes=1000)
    (file,) = (tmp_path / "export").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_an_earlier_export_is_replaced_only_by_a_whole_one(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "export"
    write(folder, source, TENSORS)
    with pytest.raises(AttributeError):
        write(folder, source, {"e": torch.zeros(3), "f": torch.zeros(3), "g": None}, max_bytes=1)
    assert set(FolderSource(folder).shapes) == set(TENSORS)
    write(folder, source, {"e": torch.zeros(3)})
    assert set(FolderSource(folder).shapes) == {"e"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "source"]


def test_targets_that_would_lose_something_are_refused(tmp_path: Path, source: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    check_target(other, source)
    (other / "thesis.txt").write_text("")
    for target, model, why in (
        (other, source, "not an exported model"),
        (other / "thesis.txt", source, "is a file"),
        (source / ".." / "source", source, "the model came from"),
        (tmp_path / "new", other, "config.json not found"),
    ):
        with pytest.raises(ValueError, match=why):
            check_target(target, model)
    write(tmp_path / "export", source, TENSORS)
    check_target(tmp_path / "export", source)
