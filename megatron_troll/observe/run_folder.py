"""The run folder runs/<name>/: its lock, and checks of which run it holds."""

import fcntl
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from megatron_troll.config import MadeWith, RunPaths
from megatron_troll.config.document import parse
from megatron_troll.mcore.checkpoint_folder import steps
from megatron_troll.system import write_atomic

# Keys that a resumed run may change: its length, where and how it is computed, what is recorded.
CHANGEABLE = (
    "name",
    "resume",
    "runs",
    "train.steps",
    "train.token_budget",
    "train.head_chunk",
    "train.share_prefixes",
    "rollout.max_sequences",
    "rollout.sglang.*",
    "models.*.layout.*",
    "models.*.recompute",
    "evaluation.every",
    "eval",
    "eval.*",
    "checkpoint.*",
    "observe.*",
    "launch.*",
    "serve.*",
)
# Keys of a source that choose its prompts and their share.
OF_SOURCE = (
    "files",
    "gym",
    "gym.*",
    "schema",
    "columns.*",
    "answer_form",
    "where",
    "where.*",
    "instruction",
    "system",
    "weight",
)
# Keys that may change together with what a run is made with, if `resume.accept` names it.
ACCEPTABLE: dict[MadeWith, tuple[str, ...]] = {
    "data": (
        "data.files",
        "data.gym",
        "data.gym.*",
        "data.schema",
        "data.columns.*",
        "data.answer_form",
        "data.where",
        "data.where.*",
        "data.instruction",
        "data.system",
        "data.malformed",
        "data.overlong_prompts",
        "data.max_prompt_tokens",
        "data.sources",
        *(f"data.sources.*.{key}" for key in OF_SOURCE),
    ),
    "held_out": ("data.held_out", "data.held_out.*"),
    "tokenizer": ("models.policy.path", "models.rollout.path"),
    "template": ("data.template_arguments", "data.template_arguments.*", "date"),
    "stop_tokens": ("rollout.sampling.stop",),
    "reference": ("models.reference.path",),
    "rewards": ("reward.*", "data.sources.*.reward", "data.sources.*.reward.*"),
    "methods": (),
}
# Keys that runs of earlier versions lack, with the values at which they continue.
ADDED: dict[str, Any] = {
    "data.columns.*": None,
    "data.answer_form": None,
    "data.where": {},
    "data.sources.*.columns.*": None,
    "data.sources.*.answer_form": None,
    "data.sources.*.where": {},
    "data.gym": None,
    "data.instruction": None,
    "data.sources": {},
    "data.system": None,
    "data.template_arguments": {},
    "date": None,
    "train.head_chunk": None,
    "reward.overlong.soft": None,
    "reward.reasoning": "drop",
}
ABSENT = "(absent)"
CONTINUE = "Continue it with resume=true"


class RunFolderError(RuntimeError):
    """The run folder belongs to another process, another config, or an earlier run."""


@dataclass(frozen=True)
class RunFolder(RunPaths):
    """The folder of one run. Any rank may hold one; only rank 0 opens it."""

    @contextmanager
    def open(
        self,
        config_yaml: str,
        resume: bool,
        accepted: Sequence[MadeWith] = (),
        check: Callable[[], object] = lambda: None,
    ) -> Iterator[None]:
        """Lock the folder until the block ends, write `config_yaml` into it, and delete its `stopped` file.

        Raises RunFolderError if another process has the lock, or if the folder holds a run and that run has
        another config (except for keys in CHANGEABLE and those that go with what is `accepted`), is a
        finished evaluation or has lost its checkpoints, or `resume` is false; and whatever `check`, called
        with the lock, raises. Neither file is touched then.
        """
        self._refuse_kinds()
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.lock, "a+", errors="replace") as lock:
            self._take(lock)
            self._check(config_yaml, resume, accepted)
            check()
            write_atomic(self.config, config_yaml)
            self.stopped.unlink(missing_ok=True)
            yield

    def check(
        self, config_yaml: str, resume: bool, accepted: Sequence[MadeWith] = (), again: str = CONTINUE
    ) -> None:
        """Raise RunFolderError if `open` would raise it now; `again` says how a run that is there goes on.
        Writes nothing."""
        self.check_free()
        self._check(config_yaml, resume, accepted, again)

    def check_free(self) -> None:
        """Raise RunFolderError if another process has the lock, or a file is where the run has a folder.
        Writes nothing."""
        self._refuse_kinds()
        if self.lock.exists():
            with open(self.lock, "r+", errors="replace") as lock:
                self._lock(lock)

    def was_opened(self) -> bool:
        """Whether a run has written here, or had only begun to."""
        return self.lock.exists() or self.holds_run()

    def holds_run(self) -> bool:
        """Whether results, checkpoints or rollouts would be lost or mixed if another run started here."""
        figures = any(
            path.exists() and path.stat().st_size > 0
            for path in (self.metrics, self.discarded_metrics, self.evaluation)
        )
        return figures or any(
            folder.is_dir() and any(folder.iterdir()) for folder in (self.checkpoints, self.rollouts)
        )

    def date(self) -> str | None:
        """The date of the run that is here; None if there is no run, it has none, or its configuration cannot
        be read, which `check` reports."""
        try:
            return flat_config(self.config.read_text()).get("date") if self.holds_run() else None
        except (OSError, ValueError, RecursionError):
            return None

    def lost(self, step: int) -> str:
        """A remark for a run that continues from `step`, if a later step was saved and is gone; else ""."""
        if not self.saved.is_file() or not (text := self.saved.read_bytes().strip()).isdigit():
            return ""
        later = int(text)
        return f" (step {later} was saved too, and its checkpoint is gone)" if later > step else ""

    def _take(self, lock: IO[str]) -> None:
        self._lock(lock)
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()

    def _lock(self, lock: IO[str]) -> None:
        """Take a POSIX lock. It ends with this process or `lock`, and forked workers do not inherit it."""
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            lock.seek(0)
            raise RunFolderError(
                f"{self.root} is being written by {lock.read().strip() or 'another process'}. "
                "Wait for that run or stop it, or choose another `name`."
            ) from None
        except OSError as error:
            raise RunFolderError(
                f"{self.root} cannot be locked ({error.strerror}). "
                "Set `runs` to a file system that supports POSIX locks."
            ) from error

    def _refuse_kinds(self) -> None:
        """Raise RunFolderError for a folder where the run has a file, or the reverse."""
        files = (
            self.lock,
            self.config,
            self.metrics,
            self.discarded_metrics,
            self.summary,
            self.changes,
            self.saved,
            self.stopped,
            self.report,
            self.curves,
        )
        folders = (
            self.root,
            self.checkpoints,
            self.rollouts,
            self.rollouts / "discarded",
            self.tensorboard,
            self.heartbeat,
            self.logs,
        )
        for path in files:
            if path.exists() and not path.is_file():
                raise RunFolderError(f"{path} is no file, and the run has a file there: move it away")
        for path in folders:
            if path.exists() and not path.is_dir():
                raise RunFolderError(f"{path} is no folder, and the run has a folder there: move it away")

    def _check(
        self, config_yaml: str, resume: bool, accepted: Sequence[MadeWith], again: str = CONTINUE
    ) -> None:
        if not self.holds_run():
            return
        changed = config_differences(self.config, config_yaml)
        let_through = {key for key in changed if _goes_with(key, accepted)}
        if changed.keys() - let_through:
            changed = {key: pair for key, pair in changed.items() if key not in let_through}
            lines = "\n".join(f"  {key}: {old} there, {new} now" for key, (old, new) in changed.items())
            raise RunFolderError(
                f"{self.root} holds a run of another config. These keys differ:\n{lines}\n"
                f"Choose another `name`, set them back, or delete the folder.{_advice(changed)}"
            )
        if self.evaluation.exists():
            raise RunFolderError(
                f"{self.root} holds a finished evaluation. Choose another `name`, or delete the folder."
            )
        if not resume:
            raise RunFolderError(
                f"{self.root} already holds a run of this config. {again}, choose another `name`, or delete "
                "the folder."
            )
        if self.saved.exists() and not steps(self.checkpoints):
            step = self.saved.read_text(errors="replace").strip()
            raise RunFolderError(
                f"{self.checkpoints} holds no checkpoint any longer, and step {step} was saved there. "
                f"Restore one, choose another `name`, or delete {self.saved} to start from step 0."
            )


def config_differences(old: Path, new_yaml: str) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in the file, value now), for changed keys that a resumed run may not change.
    Raises RunFolderError if the file is missing or damaged."""
    try:
        before = flat_config(old.read_text())
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise RunFolderError(
            f"{old} cannot be read, so that its run cannot be compared to this one: {reason}. "
            "Restore it, choose another `name`, or delete the folder."
        ) from None
    after = flat_config(new_yaml)
    before = with_added(before, after)
    return {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, ABSENT) != after.get(key, ABSENT)
        and not any(fnmatchcase(key, pattern) for pattern in CHANGEABLE)
    }


def with_added(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted keys `before`, with those of `after` that a run of an earlier version lacks (ADDED)."""
    added = {key: value for key in after for pattern, value in ADDED.items() if fnmatchcase(key, pattern)}
    return added | dict(before)


def flat_config(config_yaml: str) -> dict[str, Any]:
    """The dotted keys of a configuration and their values, read as a configuration is: a text like 2026-11-28
    is no date. Raises ValueError if it is no mapping or no YAML."""
    tree = parse(config_yaml, "config.yaml").plain()
    if not tree or not isinstance(tree, dict):
        raise ValueError("it holds no mapping of keys to values")
    return flatten(tree)


def _goes_with(key: str, parts: Iterable[MadeWith]) -> bool:
    return any(fnmatchcase(key, pattern) for part in parts for pattern in ACCEPTABLE[part])


def _advice(changed: Iterable[str]) -> str:
    """A sentence about `resume.accept`, if that could let all these keys through; else ""."""
    named = [next((part for part in ACCEPTABLE if _goes_with(key, [part])), None) for key in changed]
    if None in named:
        return ""
    parts = ", ".join(dict.fromkeys(map(str, named)))
    return f" To continue with the new values: resume.accept=[{parts}]."


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested dicts to dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
