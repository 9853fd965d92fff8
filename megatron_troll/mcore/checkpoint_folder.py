"""A folder of checkpoints. `step_000010/` exists only once it is complete: it is written under another name,
flushed to disk and renamed. Folders that a killed process leaves end in `.tmp` and are never loaded."""

import json
import os
import re
import shutil
import uuid
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from megatron_troll.mcore.checkpoint_sums import (
    SUMS,
    SumsError,
    check_sums,
    collect,
    read_sums,
    sums_of,
    write_sums,
)
from megatron_troll.system import flush, write_atomic

MANIFEST = "checkpoint.json"
# The folder of the tensors, and the file in it that names the format in which Megatron wrote them.
TENSORS = "tensors"
BACKENDS = "metadata.json"
MEGATRON = "megatron-core"
FORMAT = 2
_COMPLETE = re.compile(r"step_(\d{6,})")
_UNFINISHED = ".tmp"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or used; the message names it, the reason, and what to do."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a model folder holds its weights, next to config and tokenizer, as a Megatron checkpoint."""
    return (folder / TENSORS / BACKENDS).is_file()


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    if not folder.is_dir():
        return []
    names = [_COMPLETE.fullmatch(entry.name) for entry in folder.iterdir() if entry.is_dir()]
    return sorted(int(name.group(1)) for name in names if name)


def room(folder: Path) -> str:
    """The room on the disk of `folder` in words: bytes, and files where their number is limited."""
    disk = os.statvfs(folder)
    space = f"{disk.f_bavail * disk.f_frsize / 2**30:.1f} GiB"
    files = f" and {disk.f_favail} files" if disk.f_files else ""
    return f"{space}{files} are free there"


def draft(folder: Path, step: int) -> Path:
    """Create a new folder to write a checkpoint into. Removes unfinished ones of killed runs."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"step_*{_UNFINISHED}"):
        # A writer that outlived its killed trainer may still use files there; then the next save removes it.
        shutil.rmtree(leftover, ignore_errors=True)
    fresh = _unfinished_name(folder, step)
    fresh.mkdir()
    return fresh


def publish(written: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest to the draft `written`, then rename it to `final` atomically.

    Adds `files` to the manifest, the size of every other file in bytes, and `sums`, the name of the file with
    the SHA-256 sums of all. Files that their writers have not summed are summed here.
    """
    sums, sizes = collect(written), {}
    for path in sorted(written.rglob("*")):
        flush(path)
        if path.is_file():
            sizes[str(path.relative_to(written))] = path.stat().st_size
    write_atomic(written / MANIFEST, json.dumps({"format": FORMAT, **manifest, "files": sizes, "sums": SUMS}))
    sums |= sums_of(written, [name for name in (*sizes, MANIFEST) if name not in sums])
    write_sums(written, sums)
    flush(written)
    os.rename(written, final)
    flush(final.parent)


def discard(folder: Path, step: int) -> None:
    """Delete a complete checkpoint. Renames it first, so that a kill leaves no part of it under its name."""
    aside = _unfinished_name(folder, step)
    os.rename(path_of(folder, step), aside)
    shutil.rmtree(aside, ignore_errors=True)


def retain(folder: Path, keep_last: int, keep_best: bool) -> None:
    """Delete all checkpoints except the newest `keep_last` (at least one) and, with `keep_best`, the one with
    the highest score (the newest on a tie)."""
    found = steps(folder)
    kept = set(found[-max(keep_last, 1) :])
    scored = [(score, step) for step in found if (score := _score(folder, step)) is not None]
    if keep_best and scored:
        kept.add(max(scored)[1])
    for step in found:
        if step not in kept:
            discard(folder, step)


def read(folder: Path, step: int | None = None) -> dict[str, Any]:
    """Return the manifest of a step (None: the newest), after checking that every file has its full size.

    Raises CheckpointError naming the folder, the first bad file and the steps that are usable.
    """
    found = steps(folder)
    wanted = step if step is not None else found[-1] if found else None
    if wanted is None:
        raise CheckpointError(
            f"no complete checkpoint in {folder}: check the run's name, or start it without resume"
        )
    if wanted not in found:
        raise CheckpointError(f"{path_of(folder, wanted)} does not exist; {_usable(folder, found)}")
    try:
        return verified(path_of(folder, wanted))
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {advice(folder, wanted)}") from None


def verified(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files all have their full size. Raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error})") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise CheckpointError(f"{path / MANIFEST} is not the manifest of a checkpoint: it names no format")
    if manifest["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {manifest['format']!r}, this version reads {FORMAT}")
    step = manifest.get("step")
    if not isinstance(step, int) or path_of(path.parent, step) != path:
        raise CheckpointError(f"{path / MANIFEST} is of step {step!r}, not of the one that names its folder")
    sizes = manifest.get("files")
    if not isinstance(sizes, dict) or not all(map(_is_count, sizes.values())):
        raise CheckpointError(f"{path / MANIFEST} does not list the files of the checkpoint: it is damaged")
    summed(path, manifest)
    for name, size in sizes.items():
        file = path / name
        there = file.stat().st_size if file.is_file() else None
        if there != size:
            state = "is missing" if there is None else f"has {there} bytes instead of {size}"
            raise CheckpointError(f"{file} {state}: the checkpoint is damaged")
    return manifest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def summed(path: Path, manifest: dict[str, Any]) -> dict[str, str] | None:
    """The SHA-256 sums of the files of a checkpoint; None if it was written before there were any. Raises
    CheckpointError if they are lost or not of these files, or if the manifest itself has changed."""
    if "sums" not in manifest:
        return None
    try:
        sums = read_sums(path)
        if sums is None:
            raise SumsError(f"{path / SUMS} is missing")
        if unsummed := [name for name in (MANIFEST, *manifest["files"]) if name not in sums]:
            raise SumsError(f"{path / SUMS} does not name {unsummed[0]}")
        check_sums(path, sums, [MANIFEST])
    except SumsError as error:
        raise CheckpointError(f"{error}: the checkpoint is damaged") from error
    return sums


def advice(folder: Path, step: int) -> str:
    """A sentence on how to go on without a checkpoint that is damaged."""
    return f"Restore the file, or {_usable(folder, [other for other in steps(folder) if other != step])}"


def refuse_newer(path: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError if a checkpoint was written by a newer Megatron-Core than the installed one.
    Checkpoints of older releases can be read."""
    wrote, here = manifest["versions"].get(MEGATRON, "unknown"), version(MEGATRON)
    try:
        # The part after a `+` names a build of the same release.
        newer = Version(Version(wrote).public) > Version(Version(here).public)
    except InvalidVersion as error:
        raise CheckpointError(f"{path} names no release of {MEGATRON} that wrote it: {error}") from error
    if newer:
        raise CheckpointError(
            f"{path} was written with {MEGATRON} {wrote}, and {here} is installed, which may misread it: "
            f"use the release of this program that wrote it ({MEGATRON} {wrote}), or an older checkpoint"
        )


def _usable(folder: Path, candidates: list[int]) -> str:
    good = [str(step) for step in candidates if _is_usable(folder, step)]
    if not good:
        return f"start over: no other step in {folder} is usable"
    return f"load one of the usable steps: {', '.join(good)} (delete the folders of later steps to resume)"


def _is_usable(folder: Path, step: int) -> bool:
    try:
        verified(path_of(folder, step))
    except CheckpointError:
        return False
    return True


def _score(folder: Path, step: int) -> float | None:
    """Score of a step; None also if the manifest is damaged: retention must not stop a run because of an old
    checkpoint."""
    try:
        score = verified(path_of(folder, step)).get("score")
    except CheckpointError:
        return None
    return score if isinstance(score, int | float) else None


def _unfinished_name(folder: Path, step: int) -> Path:
    # Unique, so that a writer of a killed run cannot write into the folder of the run that replaces it.
    return folder / f"{path_of(folder, step).name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}"
