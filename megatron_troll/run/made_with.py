"""The fingerprint of all that a run is made with: kept in its checkpoints, compared when it continues.

A checkpoint holds `made_with.json` (the parts, and the changes that were accepted) and `trained_on.npz` (a
hash of each training prompt's text). Checkpoints without them are from earlier releases.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict, cast, get_args

import numpy as np
from pydantic import TypeAdapter

from megatron_troll.checks import data_of
from megatron_troll.config import MadeWith
from megatron_troll.config.load import dump
from megatron_troll.data.gym.tasks import PACKAGE
from megatron_troll.data.prompts import held_out_by_source
from megatron_troll.mcore.checkpoint_folder import path_of, steps
from megatron_troll.mcore.checkpoint_manifest import damaged, resumable
from megatron_troll.observe.run_folder import ACCEPTABLE, RunFolder, RunFolderError, flat_config, with_added
from megatron_troll.rewards.terms import Judges, names
from megatron_troll.run import digest
from megatron_troll.run.state import read_state
from megatron_troll.system import DAMAGED, naming, write_atomic
from megatron_troll.task import Task
from megatron_troll.weights.folder import COMPANIONS

RECORD, TRAINED_ON = "made_with.json", "trained_on.npz"
UNITS: dict[MadeWith, str] = {
    "data": "training prompts",
    "held_out": "held-out prompts",
    "tokenizer": "files of the tokenizer",
    "template": "characters of the chat template",
    "stop_tokens": "stop tokens",
    "reference": "files of the reference model",
    "rewards": "source files of the reward",
    "methods": "source files of methods and engine",
}
# Parts of their own: what the tokenizer's folder says of chats and of the end of an answer.
ELSEWHERE = ("chat_template.jinja", "chat_template.json", "generation_config.json")
OWN = ("megatron_troll", "troll_kernels")


@dataclass(frozen=True)
class Part:
    """One thing that a run is made with. files: the hash of each file it comes from; settings: the keys of
    the configuration that it depends on and that may change with it; releases: the version of each installed
    package that it depends on (empty in checkpoints of earlier versions)."""

    count: int = 0
    hash: str = "none"
    files: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    releases: dict[str, str] = field(default_factory=dict)

    def continues(self, before: "Part") -> bool:
        """Whether this is the part of an earlier checkpoint, maybe of a version with fewer settings."""
        settings = with_added(before.settings, self.settings)
        releases = before.releases or self.releases
        mine = (self.count, self.hash, self.settings, self.releases)
        return mine == (before.count, before.hash, settings, releases)


class Change(TypedDict):
    """A change of a part between two checkpoints, that the user accepted after `step`."""

    step: int
    part: str
    what: str


class _Content(TypedDict):
    """The content of made_with.json."""

    parts: dict[str, Part]
    changes: list[Change]


@dataclass(frozen=True)
class Provenance:
    """The fingerprint of a run, on the rank that writes checkpoints. trained: uint64 hashes of the texts of
    the training prompts, in order; earlier: those of prompts trained on before a change of the data; changes:
    what was accepted, oldest first."""

    parts: dict[str, Part]
    trained: np.ndarray
    earlier: np.ndarray
    changes: tuple[Change, ...] = ()

    @classmethod
    def of(cls, task: Task) -> "Provenance":
        """Read what `task` names. Raises OSError if a file cannot be read."""
        settings = flat_config(dump(task.config))
        parts = {
            name: replace(part, settings=_of_part(name, settings)) for name, part in _parts(task).items()
        }
        return cls(parts, digest.of_texts(task.prompts.train), np.zeros(0, dtype=np.uint64))

    def write(self, checkpoint: Path) -> None:
        """Add this record to a checkpoint that is being written."""
        parts = {name: asdict(part) for name, part in self.parts.items()}
        content = {"parts": parts, "changes": self.changes}
        with naming(checkpoint):
            (checkpoint / RECORD).write_text(json.dumps(content, indent=1))
            np.savez(checkpoint / TRAINED_ON, allow_pickle=False, trained=self.trained, earlier=self.earlier)

    @property
    def remarks(self) -> tuple[str, ...]:
        """One sentence for each accepted change, for the summary of the run."""
        return tuple(
            f"after step {change['step']}, {change['part']} was changed on purpose: {change['what']}"
            for change in self.changes
        )


@dataclass(frozen=True)
class Continued:
    """The result of a comparison. said: lines for the terminal; changed: accepted parts that differ."""

    provenance: Provenance
    said: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


def read(checkpoint: Path) -> Provenance | None:
    """The record of a checkpoint; None if it was written without. Raises CheckpointError if it is damaged."""
    if not (checkpoint / RECORD).exists() and not (checkpoint / TRAINED_ON).exists():
        return None
    try:
        content = TypeAdapter(_Content).validate_json((checkpoint / RECORD).read_bytes())
    except (OSError, ValueError) as error:
        raise damaged(checkpoint / RECORD, f"cannot be read ({str(error).splitlines()[0]})") from None
    try:
        with np.load(checkpoint / TRAINED_ON, allow_pickle=False) as file:
            trained, earlier = (
                file[name].astype(np.uint64, casting="safe") for name in ("trained", "earlier")
            )
    except DAMAGED as error:
        raise damaged(checkpoint / TRAINED_ON, f"cannot be read ({type(error).__name__}: {error})") from None
    return Provenance(content["parts"], trained.ravel(), earlier.ravel(), tuple(content["changes"]))


def continued(task: Task) -> Continued:
    """Compare what `task` is made with to the newest checkpoint of its run folder, if it continues one.

    Raises CheckpointError if that cannot be continued; RunFolderError if something has changed that
    `resume.accept` does not name, or if held-out prompts have been trained on; OSError if a file cannot be
    read. Writes nothing.
    """
    now, folder = Provenance.of(task), RunFolder.of(task.config)
    if not (task.config.resume and steps(folder.checkpoints)):
        return Continued(now)
    manifest = resumable(folder.checkpoints)
    step = manifest["step"]
    checkpoint = path_of(folder.checkpoints, step)
    read_state(checkpoint, manifest)
    before = read(checkpoint)
    if before is None:
        return Continued(
            now,
            (
                f"{checkpoint} does not say what it was made with, as an earlier release wrote it: data, "
                "tokenizer, reference and rewards are not compared",
            ),
        )
    return _compared(before, now, task, step)


def _compared(before: Provenance, now: Provenance, task: Task, step: int) -> Continued:
    names = [name for name in get_args(MadeWith) if name in before.parts or name in now.parts]
    differing = {
        name: told(name, before, now)
        for name in names
        if not now.parts.get(name, Part()).continues(before.parts.get(name, Part()))
    }
    if refused := [name for name in differing if name not in task.config.accepted]:
        lines = "\n".join(f"  {name}: {differing[name]}" for name in refused)
        raise RunFolderError(
            f"{RunFolder.of(task.config).root} cannot continue from step {step}: this has changed:\n{lines}\n"
            "Set it back, choose another `name` for a new run, or let it through with "
            f"resume.accept=[{', '.join(differing)}]."
        )
    earlier = before.earlier
    if "data" in differing:
        earlier = np.union1d(before.earlier, before.trained)
    _refuse_trained(task, np.union1d(before.earlier, before.trained), step)
    new = [Change(step=step, part=name, what=what) for name, what in differing.items()]
    said = tuple(f"WARNING: {name} has changed since step {step}: {what}" for name, what in differing.items())
    provenance = replace(now, earlier=earlier, changes=(*before.changes, *new))
    return Continued(provenance, said, tuple(differing))


def _refuse_trained(task: Task, trained: np.ndarray, step: int) -> None:
    held_out = task.prompts.held_out
    seen = np.isin(digest.of_texts(held_out), trained)
    if seen.any():
        raise RunFolderError(
            f"{int(seen.sum())} of the {len(held_out)} held-out prompts were training prompts up to step "
            f"{step} (the first is {held_out[int(seen.argmax())].id!r}), so success on them would not be "
            "that on new prompts: give data.held_out files without them, or another `name` for a new run"
        )


def told(name: str, before: Provenance, now: Provenance) -> str:
    """One line about a part that differs: counts, hashes, settings, and the files or the prompt."""
    old, new = before.parts.get(name, Part()), now.parts.get(name, Part())
    unit = UNITS[cast("MadeWith", name)]
    words = f"{old.count} {unit} (hash {old.hash}) there, {new.count} (hash {new.hash}) now"
    if old.hash == new.hash:
        words = f"the same {new.count} {unit}"
    details = [
        f"{key} {old.settings.get(key)!r} there, {new.settings.get(key)!r} now"
        for key in sorted({**old.settings, **new.settings})
        if old.settings.get(key) != new.settings.get(key)
    ]
    details += [
        f"{package} {old.releases.get(package)} there, {new.releases.get(package)} now"
        for package in sorted({**old.releases, **new.releases})
        if old.releases and old.releases.get(package) != new.releases.get(package)
    ]
    if files := list(_files(old.files, new.files)):
        details.append(", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else ""))
    if name == "data" and old.hash != new.hash:
        details.append(_first_difference(before.trained, now.trained))
    return "; ".join([words, *details])


def _files(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[str]:
    for file in sorted({**old, **new}):
        if file not in new:
            yield f"{file} is gone"
        elif file not in old:
            yield f"{file} is new"
        elif old[file] != new[file]:
            yield f"{file} has changed"


def _first_difference(old: np.ndarray, new: np.ndarray) -> str:
    shared = min(len(old), len(new))
    unequal = np.flatnonzero(old[:shared] != new[:shared])
    if not len(unequal) and len(old) == len(new):
        return "the texts are the same: ids, answers or other fields differ"
    return f"the first prompt with another text is number {int(unequal[0] if len(unequal) else shared) + 1}"


def note(folder: RunFolder, provenance: Provenance) -> None:
    """Write the accepted changes to the run folder, if there are any."""
    if provenance.changes:
        write_atomic(folder.changes, json.dumps(list(provenance.changes), indent=1) + "\n")


def _parts(task: Task) -> dict[str, Part]:
    config, prompts, data = task.config, task.prompts, data_of(task.config)
    files = [file for source in data.mixture.values() for file in source.files or ()]
    held_out = [file for one in held_out_by_source(data).values() if isinstance(one, tuple) for file in one]
    gym = any(source.gym is not None for source in data.mixture.values())
    made = {PACKAGE: version(PACKAGE)} if gym else {}
    parts = {
        "data": Part(len(prompts.train), digest.of_prompts(prompts.train), _named(files), releases=made),
        "held_out": Part(
            len(prompts.held_out), digest.of_prompts(prompts.held_out), _named(held_out), releases=made
        ),
        "tokenizer": _tokenizer(Path(config.policy.path)),
        "template": _text(json.dumps(task.tokenizer.chat_template)),
        "stop_tokens": Part(len(task.stop_ids), digest.short([str(task.stop_ids).encode()])),
    }
    reference = config.models.reference
    if reference is not None and task.objective.needs_reference:
        parts["reference"] = _together(_weights(Path(reference.path)))
    slots = (getattr(config.objective, slot).name for slot in ("advantage", "ratio", "trust_region", "kl"))
    for name, classes in (
        ("rewards", names(list(task.rewards.values()))),
        ("methods", [*slots, config.objective.correction.name, config.rollout.engine]),
    ):
        if files := _code(classes):
            parts[name] = _together(files)
    if packages := {package for reward in task.rewards.values() for package in Judges(reward).packages}:
        parts["rewards"] = replace(
            parts.get("rewards", Part()), releases={package: version(package) for package in sorted(packages)}
        )
    return parts


def _of_part(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    patterns = ACCEPTABLE[cast("MadeWith", name)]
    return {
        key: value
        for key, value in settings.items()
        if any(fnmatchcase(key, pattern) for pattern in patterns)
    }


def _text(text: str) -> Part:
    return Part(len(text), digest.short([text.encode(errors="surrogatepass")]))


def _together(files: dict[str, str]) -> Part:
    return Part(len(files), digest.of_files(files), files)


def _named(paths: Iterable[str]) -> dict[str, str]:
    return {path: digest.of_file(Path(path)) for path in paths}


def _tokenizer(folder: Path) -> Part:
    """The files of a tokenizer. Of its settings, the template is a part of its own, and the release that
    wrote them changes nothing."""
    files = {
        name: digest.of_file(folder / name)
        for name in COMPANIONS
        if name not in ELSEWHERE and (folder / name).is_file()
    }
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = json.loads(settings.read_bytes())
        kept = {
            key: value
            for key, value in content.items()
            if key not in ("chat_template", "transformers_version")
        }
        files[settings.name] = digest.short([json.dumps(kept, sort_keys=True).encode()])
    return _together(files)


def _weights(folder: Path) -> dict[str, str]:
    """The files of a model's weights, in either format, and its sizes."""
    patterns = ("config.json", "*.safetensors", "tensors/*", "tensors/.metadata")
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return {str(file.relative_to(folder)): digest.of_file(file) for file in sorted(found)}


def _code(classes: list[str]) -> dict[str, str]:
    """The source files of classes named by import path, with the modules beside them that they import."""
    files: dict[str, str] = {}
    for module, colon, _ in (name.partition(":") for name in classes):
        source = getattr(sys.modules.get(module), "__file__", None) if colon else None
        if source is None or module.split(".")[0] in OWN:
            continue
        depth = len(module.split(".")) - (Path(source).name != "__init__.py")
        found = digest.sources(Path(source).parents[depth], module, OWN)
        files |= {name: digest.of_file(path) for name, path in found.items()}
    return files
