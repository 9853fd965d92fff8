"""No pickle of a checkpoint is followed that does more than describe tensors; real ones are followed.

What a pickle here would run leaves a mark, and does nothing else.
"""

import io
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import WriteItemType

from megatron_troll.mcore import checkpoint_pickle
from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.mcore.checkpoint_pickle import COMMON, COMMON_OBJECT, METADATA, read_index, vet

EXTRA = "policy.decoder.layers.self_attention.linear_qkv._extra_state/shard_0_1"
EMPTY = torch.empty(0, dtype=torch.uint8)
MARK = "mark"
HERE = f"{__name__}.leave_mark"


def leave_mark(folder: str) -> dict[str, Any]:
    (Path(folder) / MARK).touch()
    return {}


class Marking:
    """Leaves a mark in `folder` when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return leave_mark, (self.folder,)


def write(folder: Path, objects: dict[str, Any]) -> Path:
    """A checkpoint of a tensor and `objects`, by torch."""
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save({"w": torch.ones(2, 3), **objects}, checkpoint_id=folder, planner=planner, no_dist=True)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What Megatron-Core 0.19 writes."""
    return write(tmp_path / "tensors", {COMMON_OBJECT: [{}], EXTRA: [EMPTY]})


def refusal(folder: Path) -> str:
    """Why `folder` is refused, in one line, with nothing of it run."""
    with pytest.raises(CheckpointError) as caught:
        vet(folder)
    assert not (folder / MARK).exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_payload_leaves_a_mark_where_nothing_is_vetted(folder: Path) -> None:
    pickle.loads(pickle.dumps(Marking(folder)))  # noqa: S301 - of the line itself
    assert (folder / MARK).exists()


def test_what_megatron_writes_is_followed(folder: Path) -> None:
    vet(folder)
    index = read_index(folder / METADATA)
    assert set(index.state_dict_metadata) == {"w", COMMON_OBJECT, EXTRA}
    assert index == pickle.loads((folder / METADATA).read_bytes())  # noqa: S301 - written above


def test_what_an_older_megatron_writes_is_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "tensors", {})
    torch.save({}, folder / COMMON)
    vet(folder)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_an_index_that_runs_code_is_refused(protocol: int, folder: Path) -> None:
    (folder / METADATA).write_bytes(pickle.dumps(Marking(folder), protocol))
    message = refusal(folder)
    assert str(folder / METADATA) in message
    assert f"it holds {HERE}, which nothing in a checkpoint needs. Nothing of it was run" in message


@pytest.mark.parametrize("hidden", ["planner_data", "version"])
def test_code_in_a_corner_of_a_real_index_is_refused(hidden: str, folder: Path) -> None:
    index = read_index(folder / METADATA)
    setattr(index, hidden, [Marking(folder)])
    (folder / METADATA).write_bytes(pickle.dumps(index))
    assert HERE in refusal(folder)


def test_common_state_that_runs_code_is_refused(folder: Path) -> None:
    torch.save({"args": Marking(folder)}, folder / COMMON)
    message = refusal(folder)
    assert str(folder / COMMON) in message
    assert HERE in message


@pytest.mark.parametrize("key", [COMMON_OBJECT, EXTRA, "policy.output_layer.weight"])
def test_an_object_among_the_tensors_that_runs_code_is_refused(key: str, tmp_path: Path) -> None:
    folder = tmp_path / "tensors"
    write(folder, {COMMON_OBJECT: [{}], key: [{"args": Marking(folder)}]})
    message = refusal(folder)
    assert str(folder / "__0_0.distcp") in message
    assert key in message
    assert HERE in message


def test_a_file_of_torch_from_before_archives_is_refused(folder: Path) -> None:
    torch.save({"args": Marking(folder)}, folder / COMMON, _use_new_zipfile_serialization=False)
    assert "it is not what torch.save writes" in refusal(folder)


def test_a_program_of_torchscript_is_refused(folder: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), folder / COMMON)
    assert "it holds a program (TorchScript)" in refusal(folder)


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (
            torch.frombuffer(bytearray(pickle.dumps({})), dtype=torch.uint8),
            "for Transformer Engine to unpickle",
        ),
        (io.BytesIO(b"state"), "it holds _io.BytesIO"),
        (torch.zeros(2), "it holds torch.FloatStorage"),
        ("text", "it is str, and not a state"),
    ],
)
def test_a_state_that_would_be_unpickled_again_is_refused(state: Any, reason: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "tensors", {EXTRA: [state]})
    message = refusal(folder)
    assert reason in message
    assert EXTRA in message


def test_common_state_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "not a state" in refusal(write(tmp_path / "a", {COMMON_OBJECT: [EMPTY]}))
    assert "not a list of objects" in refusal(write(tmp_path / "b", {COMMON_OBJECT: []}))


def test_a_second_index_is_refused(folder: Path) -> None:
    """torch reads it where it cannot read the first."""
    (folder / f"__0{METADATA}").write_bytes(pickle.dumps(Marking(folder)))
    assert "__0.metadata is a second index, which no checkpoint has: remove it" in refusal(folder)


@pytest.mark.parametrize("name", [METADATA, COMMON, "__0_0.distcp"])
def test_a_link_out_of_the_folder_is_refused(name: str, folder: Path) -> None:
    torch.save({}, folder / COMMON)
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")
    assert f"{folder / name} is a link out of the checkpoint" in refusal(folder)


def test_links_within_the_folder_and_to_it_are_followed(folder: Path) -> None:
    (folder / METADATA).rename(folder / "index")
    (folder / METADATA).symlink_to("index")
    link = folder.parent / "link"
    link.symlink_to(folder)
    vet(link)


def test_a_link_that_leads_nowhere_is_refused(folder: Path) -> None:
    (folder / COMMON).symlink_to(COMMON)
    assert f"{folder / COMMON} is missing or not a file" in refusal(folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_an_index_that_is_no_file_is_refused(make: Callable[[Path], None], folder: Path) -> None:
    (folder / METADATA).unlink()
    assert "is missing or not a file" in refusal(folder)
    make(folder / METADATA)
    assert "is missing or not a file" in refusal(folder)


def test_any_cut_of_an_index_is_told(folder: Path) -> None:
    whole = (folder / METADATA).read_bytes()
    for length in range(0, len(whole), 7):
        (folder / METADATA).write_bytes(whole[:length])
        assert f"{folder / METADATA} cannot be read as the index of a checkpoint" in refusal(folder)


def test_any_cut_of_the_objects_is_told(folder: Path) -> None:
    (file,) = folder.glob("*.distcp")
    whole = file.read_bytes()
    index = read_index(folder / METADATA)
    ends = [(p := index.storage_data[MetadataIndex(key)]).offset + p.length for key in (COMMON_OBJECT, EXTRA)]
    for length in (0, max(ends) - 1):
        file.write_bytes(whole[:length])
        assert f"{file} is cut short, {length} bytes of at least" in refusal(folder)
    file.write_bytes(bytes(len(whole)))
    assert "it is not what torch.save writes" in refusal(folder)


ABSURD = [
    b"",
    b".",
    b"text",
    pickle.dumps([1, 2]),
    pickle.dumps(Metadata({})),
    pickle.dumps(Metadata({"w": 1})),  # pyright: ignore
    pickle.dumps(Metadata({}, storage_data={"w": "file"})),
    pickle.dumps(Metadata({}, storage_data={}, storage_meta=Metadata)),  # pyright: ignore
    pickle.dumps({}) + b"." * 10,
    b"\x80\x09N.",  # a protocol that is none
    b"\x8e" + struct.pack("<Q", 2**62) + b"x.",  # more bytes than there is memory
    b"\x82\x01.",  # an extension that is not registered
    b"Pid\n.",  # a storage beside it
    b"h\x05.",  # a memo that is not there
    b"(" * 10_000 + b".",
    b"}]Ns.",  # a key that has no hash
    b"X\x02\x00\x00\x00\xff\xff.",  # text that is none
]


@pytest.mark.parametrize("content", ABSURD)
def test_an_absurd_index_is_told(content: bytes, folder: Path) -> None:
    (folder / METADATA).write_bytes(content)
    assert f"{folder / METADATA} cannot be read as the index of a checkpoint" in refusal(folder)


@pytest.mark.parametrize("path", ["/dev/stdin", "../w", "..", "", "a/b", "a\nb", "a\0"])
def test_an_index_that_points_out_of_the_folder_is_refused(path: str, folder: Path) -> None:
    index = read_index(folder / METADATA)
    index.storage_data[MetadataIndex(COMMON_OBJECT)].relative_path = path
    (folder / METADATA).write_bytes(pickle.dumps(index))
    assert "not a description of tensors" in refusal(folder)


def named(module: str, name: str) -> bytes:
    """A pickle of a global, in the way of protocol 4."""
    return b"\x80\x04" + b"".join(b"\x8c" + bytes([len(t)]) + t.encode() for t in (module, name)) + b"\x93."


METADATAS = Metadata.__module__


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (METADATAS, "Metadata.__init__"),
        (METADATAS, "Metadata.__init__.__globals__"),
        (METADATAS, "os"),
        (METADATAS, "os.path.join"),
        (METADATAS, "field"),
        ("torch.serialization", "_get_layout.__globals__"),
        ("torch", "load"),
        ("torch", "float32.__class__"),
        ("builtins", "getattr"),
        ("builtins", "print"),
        ("__builtin__", "print"),
        ("evil\n\x1b[2J", "name"),
    ],
)
def test_only_whole_names_are_allowed(module: str, name: str, folder: Path) -> None:
    (folder / METADATA).write_bytes(named(module, name))
    message = refusal(folder)
    assert f"it holds {ascii(f'{module}.{name}')[1:-1]}, which" in message
    assert message.isprintable()


@pytest.mark.parametrize("target", [Metadata, TensorProperties, PosixPath, WriteItemType])
@pytest.mark.parametrize("state", [{"a": 1}, (None, {"a": 1})])
def test_a_pickle_may_not_change_a_class(target: type, state: Any, folder: Path) -> None:
    """Which needs no global but the class."""
    (folder / METADATA).write_bytes(built(target.__module__, target.__qualname__, state))
    assert "it changes a class or function" in refusal(folder)
    assert not hasattr(target, "a")


def built(module: str, name: str, state: Any) -> bytes:
    text = pickle.dumps(state, protocol=2)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + text[2:-1] + b"b."


def test_a_pickle_may_not_change_a_function(folder: Path) -> None:
    (folder / METADATA).write_bytes(built("torch.serialization", "_get_layout", {"cache": {"a": 1}}))
    assert "it changes a class or function" in refusal(folder)
    assert "a" not in torch.serialization._get_layout.cache  # pyright: ignore


def test_a_pickle_may_not_change_a_constant(folder: Path) -> None:
    text = pickle.dumps(WriteItemType.SHARD, protocol=2)
    (folder / METADATA).write_bytes(text[:-1] + pickle.dumps({"a": 1}, protocol=2)[2:-1] + b"b.")
    assert "it changes a constant" in refusal(folder)
    assert not hasattr(WriteItemType.SHARD, "a")


def test_everything_allowed_is_there_and_runs_nothing() -> None:
    """Classes, a lookup in a table, and the function that makes a tensor of a storage."""
    functions = set()
    for module, name in (*checkpoint_pickle.INDEX_GLOBALS, *checkpoint_pickle.OBJECT_GLOBALS):
        found = getattr(__import__(module, fromlist=[name]), name)
        if not isinstance(found, type | torch.dtype):
            functions.add(f"{module}.{name}")
    assert functions == {"torch.serialization._get_layout", "torch._utils._rebuild_tensor_v2"}
