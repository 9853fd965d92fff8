"""Checks of the manifest of a checkpoint (checkpoint.json) and of Megatron's own small file beside it."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_troll.mcore import checkpoint_folder as folders
from megatron_troll.mcore.checkpoint_folder import BACKENDS, MANIFEST, TENSORS, CheckpointError

Count = Annotated[int, Field(ge=0)]


class _Saved(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class SavedCounters(_Saved):
    optimizer_steps: Count
    schedule_steps: Count


class SavedModel(_Saved):
    shape: dict[str, Any]
    counters: SavedCounters


class SavedLayouts(_Saved):
    world: Count
    models: dict[str, dict[str, int]]


class Manifest(_Saved):
    """The fields that loading reads; others may be there."""

    step: Count
    score: float | None
    layouts: SavedLayouts
    models: Annotated[dict[str, SavedModel], Field(min_length=1)]
    versions: dict[str, str]
    files: dict[str, Count]
    state: dict[str, Any]


class _Backends(_Saved):
    sharded_backend: str
    sharded_backend_version: int


def resumable(folder: Path) -> dict[str, Any]:
    """The manifest of the newest checkpoint in `folder`, after every check that needs no model. Raises
    CheckpointError."""
    manifest = folders.read(folder)
    path = folders.path_of(folder, manifest["step"])
    check(path, manifest)
    folders.refuse_newer(path, manifest)
    return manifest


def check(path: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError, with file and field, unless `path` says everything that loading needs."""
    _checked(Manifest, manifest, path / MANIFEST)
    try:
        named = json.loads((path / TENSORS / BACKENDS).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path / TENSORS / BACKENDS, f"cannot be read ({error})") from None
    _checked(_Backends, named, path / TENSORS / BACKENDS)
    if named["sharded_backend"] != "torch_dist":
        raise damaged(path / TENSORS / BACKENDS, f"names the format {named['sharded_backend']!r}")


def damaged(file: Path, problem: str) -> CheckpointError:
    """The error about a file of a checkpoint that is not as it was written."""
    return CheckpointError(
        f"{file} {problem}: the checkpoint is damaged. Restore the file, or move the folder of this step "
        "away to continue from the checkpoint before it"
    )


def _checked(kind: type[BaseModel], content: Any, file: Path) -> None:
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise damaged(file, f"does not say what it must: {where}: {first['msg'].lower()}") from None
