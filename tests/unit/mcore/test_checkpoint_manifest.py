"""A checkpoint whose own small files are damaged is refused with the file and the field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.mcore.checkpoint_manifest import resumable
from megatron_troll.run.state import TrainState, read_state
from tests.unit.run.stored import store


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return store(tmp_path, 2)


def refusal(checkpoint: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state(checkpoint, resumable(checkpoint.parent))
    return str(caught.value)


def edited(checkpoint: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = checkpoint / "checkpoint.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    manifest.pop("sums", None)  # they are checked elsewhere
    path.write_text(json.dumps(manifest))


def test_a_whole_one_is_read(checkpoint: Path) -> None:
    state = read_state(checkpoint, resumable(checkpoint.parent))
    assert state == TrainState(step=2, position=8, seconds=1.5, before=0.5)


FIELDS = ["format", "step", "score", "layouts", "models", "versions", "files", "state"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_is_missing_is_named(checkpoint: Path, field: str) -> None:
    edited(checkpoint, lambda manifest: manifest.pop(field))
    said = refusal(checkpoint)
    assert "checkpoint.json" in said
    assert field in said


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", ["x", [1], True, {"x": []}])
def test_a_field_of_another_kind_is_refused(checkpoint: Path, field: str, value: object) -> None:
    edited(checkpoint, lambda manifest: manifest.update({field: value}))
    assert str(checkpoint) in refusal(checkpoint)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        (("models", "policy", "counters"), {}, "models.policy.counters.optimizer_steps: field required"),
        (
            ("models", "policy", "counters", "schedule_steps"),
            -4,
            "policy.counters.schedule_steps: input",
        ),
        (("models", "policy", "shape"), 3, "models.policy.shape: input should be a valid dictionary"),
        (("models",), {}, "models: dictionary should have at least 1 item"),
        (("versions", "torch"), 2, "versions.torch: input should be a valid string"),
        (("versions", "megatron-core"), "x", "names no release of megatron-core"),
        (("state", "step"), 3, "has step 2 and a state of step 3"),
        (("state", "position"), -1, "state.position: input should be greater than or equal to 0"),
        (("state", "position"), "8", "state.position: input should be a valid integer"),
        (("state", "momentum"), 1, "state.momentum: unexpected keyword argument"),
        (("state", "seconds"), None, "state.seconds: input should be a valid number"),
        (("step",), 3, "is of step 3, not of the one that names its folder"),
        (("format",), 3, "has format 3, this version reads 2"),
        (("files", "tensors/metadata.json"), 5, "tensors/metadata.json has 63 bytes instead of 5"),
    ],
)
def test_what_is_wrong_is_told(checkpoint: Path, key: tuple[str, ...], value: object, said: str) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        *path, last = key
        for name in path:
            manifest = manifest[name]
        manifest[last] = value

    edited(checkpoint, edit)
    assert said in refusal(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"7", b"[" * 100_000])
def test_a_manifest_that_is_no_manifest_is_named(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "checkpoint.json").write_bytes(content)
    assert "step_000002/checkpoint.json" in refusal(checkpoint)


@pytest.mark.parametrize(
    "content",
    [
        b'{"sharded_backend": "torch_dist", "sharded_backend_version": "1"}',
        b'{"sharded_backend": "zarr", "sharded_backend_version": 1}',
        b'{"sharded_backend_version": 1}',
        b"[]",
        b"\xff",
        b"[" * 100_000,
    ],
)
def test_megatrons_own_small_file_is_checked_too(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "tensors" / "metadata.json").write_bytes(content)
    edited(checkpoint, lambda manifest: manifest["files"].update({"tensors/metadata.json": len(content)}))
    assert "step_000002/tensors/metadata.json" in refusal(checkpoint)


def test_the_newest_is_named_and_older_ones_that_are_whole(checkpoint: Path) -> None:
    store(checkpoint.parent, 4)
    (checkpoint.parent / "step_000004" / "checkpoint.json").write_text("{}")
    said = refusal(checkpoint)
    assert "step_000004/checkpoint.json is not the manifest of a checkpoint" in said
    assert "load one of the usable steps: 2" in said
