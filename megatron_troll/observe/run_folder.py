"""The run folder runs/<name>/: its lock, and checks of which run it holds."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

import yaml

from megatron_troll.config import RunPaths
from megatron_troll.mcore.checkpoint_folder import steps
from megatron_troll.system import write_atomic

# Keys that a resumed run may change: its length, where and how it is computed, what is recorded.
CHANGEABLE = (
    "name",
    "resume",
    "runs",
    "train.steps",
    "train.token_budget",
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
ABSENT = "(absent)"


class RunFolderError(RuntimeError):
    """The run folder belongs to another process, another config, or an earlier run."""


@dataclass(frozen=True)
class RunFolder(RunPaths):
    """The folder of one run. Any rank may hold one; only rank 0 opens it."""

    @contextmanager
    def open(self, config_yaml: str, resume: bool) -> Iterator[None]:
        """Lock the folder until the block ends, write `config_yaml` into it, and delete its `stopped` file.

        Raises RunFolderError if another process has the lock, or if the folder holds a run and that run has
        another config (except for keys in CHANGEABLE), is a finished evaluation or has lost its checkpoints,
        or `resume` is false. Neither file is touched then.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with open(self.lock, "a+") as lock:
            self._take(lock)
            self._check(config_yaml, resume)
            write_atomic(self.config, config_yaml)
            self.stopped.unlink(missing_ok=True)
            yield

    def check(self, config_yaml: str, resume: bool) -> None:
        """Raise RunFolderError if `open` would raise it now. Writes nothing."""
        if self.lock.exists():
            with open(self.lock, "r+") as lock:
                self._lock(lock)
        self._check(config_yaml, resume)

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

    def _check(self, config_yaml: str, resume: bool) -> None:
        if not self.holds_run():
            return
        changed = config_differences(self.config, config_yaml) if self.config.exists() else {}
        if changed:
            lines = "\n".join(f"  {key}: {old} there, {new} now" for key, (old, new) in changed.items())
            raise RunFolderError(
                f"{self.root} holds a run of another config. These keys differ:\n{lines}\n"
                "Choose another `name`, set them back, or delete the folder."
            )
        if self.evaluation.exists():
            raise RunFolderError(
                f"{self.root} holds a finished evaluation. Choose another `name`, or delete the folder."
            )
        if not resume:
            raise RunFolderError(
                f"{self.root} already holds a run of this config. "
                "Continue it with resume=true, choose another `name`, or delete the folder."
            )
        if self.saved.exists() and not steps(self.checkpoints):
            step = self.saved.read_text().strip()
            raise RunFolderError(
                f"{self.checkpoints} holds no checkpoint any longer, and step {step} was saved there. "
                f"Restore one, choose another `name`, or delete {self.saved} to start from step 0."
            )


def config_differences(old: Path, new_yaml: str) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value in the file, value now), for changed keys that a resumed run may not change."""
    before, after = flatten(yaml.safe_load(old.read_text()) or {}), flatten(yaml.safe_load(new_yaml) or {})
    return {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in sorted(before.keys() | after.keys())
        if before.get(key, ABSENT) != after.get(key, ABSENT)
        and not any(fnmatchcase(key, pattern) for pattern in CHANGEABLE)
    }


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Convert nested dicts to dotted keys; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
