"""Save and load whole training states with Megatron's distributed checkpoints (torch_dist).

A checkpoint folder holds `tensors/` with Megatron's files, `rng_<rank>.json`, and `checkpoint.json` with
everything else. Our files are JSON, and tensors are read with weights_only. Whatever else Megatron and torch
unpickle is checked first (checkpoint_pickle.py): loading a checkpoint never runs code from it, whatever its
source.
"""

import json
import logging
import math
import multiprocessing
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any, Literal

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch.distributed.checkpoint import CheckpointException

from megatron_troll.mcore import checkpoint_folder as folders
from megatron_troll.mcore import checkpoint_tensors as tensors
from megatron_troll.mcore.checkpoint_folder import TENSORS, CheckpointError
from megatron_troll.mcore.checkpoint_manifest import check, damaged
from megatron_troll.mcore.checkpoint_pickle import vet
from megatron_troll.mcore.checkpoint_sums import SumsError, check_sums, summing
from megatron_troll.mcore.optimizer import Trainable
from megatron_troll.mcore.shape import described
from megatron_troll.system import end_with_parent, spared

VERSIONED = (folders.MEGATRON, "torch")
# Raised by Megatron only on the rank that failed; torch's CheckpointException is raised on every rank.
HELPER_ENDED = "the process that collects what Megatron's writer has written ended, as when it is killed"
WRITER_ENDED = "the process that writes ended without a result, as when it is killed or memory runs out"
NO_RESULT = "results_queue should not be empty"  # Megatron's words for it
LOCAL_FAILURES = (CheckpointingException, OSError, EOFError, pickle.UnpicklingError)


class Checkpoints:
    """The checkpoints of one run, with the models it trains by name. Except for `latest`, `steps` and `path`,
    every method must be called on every rank and blocks on all of them.

    `folder` must be on a file system that all ranks share. A program that saves needs an
    `if __name__ == "__main__"` guard: Megatron spawns a helper process.
    """

    def __init__(
        self,
        folder: str | Path,
        trainables: dict[str, Trainable],
        keep_last: int = 2,
        keep_best: bool = True,
        asynchronous: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.trainables = trainables
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.asynchronous = asynchronous
        self._world = next(iter(trainables.values())).model.groups.world
        self._queue = AsyncCallsQueue()
        self._draft = Path()
        self._at: int | None = None

    def steps(self) -> list[int]:
        """Steps that can be loaded, ascending."""
        return folders.steps(self.folder)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        return folders.path_of(self.folder, step)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        score: float | None = None,
        attach: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """Write models, optimizers, schedules, random generators and `state` (JSON values, from rank 0) as
        `step`. On rank 0, `attach` is called with the folder and may write more files into it.

        The folder appears under its name only once every rank's files are on disk. An asynchronous save does
        this in a later `maybe_finalize`, the next `save` or `finish`; tensors are copied to the host (on a
        machine without GPU: snapshotted by fork) before this returns. The step that was last loaded or saved
        is not written again. After an earlier step was loaded, the steps after it are deleted when the first
        new one is complete.

        Raises CheckpointError on every rank; earlier checkpoints stay usable. Exception: if the disk fills
        while Megatron writes its own small files (`.metadata`, `metadata.json`), only rank 0 raises.
        """
        if score is not None and not math.isfinite(score):
            raise ValueError(f"the score of step {step} is {score}; leave it out or give a finite number")
        self.finish()
        if step == self._at:
            return
        manifest = self._manifest(step, json.loads(json.dumps(state)), score)
        self._draft = self._once(lambda: self._new_draft(step))
        with self._saving():
            self._once(lambda: attach(self._draft))
        with self._saving(), spared():
            own_results_queue()
            self._everywhere(
                lambda: _rng_file(self._draft, self._world.rank).write_text(tensors.captured_rng())
            )
            request = dist_checkpointing.save(
                self._sharded(loading=False),
                str(self._draft / TENSORS),
                async_sharded_save=True,
                async_strategy="mcore",
            )
            assert request is not None
            if request.async_fn is not None:
                write = summing(request.async_fn, self._draft, self._world.rank)
                request = request._replace(async_fn=write)
            request.add_finalize_fn(partial(self._publish, manifest))
            if self.asynchronous:
                self._queue.schedule_async_request(request)
            else:
                request.execute_sync()

    def maybe_finalize(self) -> None:
        """Complete an asynchronous save if every rank has written its files; returns at once if nothing is
        pending. Raises CheckpointError if writing failed."""
        self._finalize(blocking=False)

    def finish(self) -> None:
        """Wait for a pending save and complete it."""
        self._finalize(blocking=True)

    def load(self, step: int | Literal["latest"] = "latest") -> dict[str, Any]:
        """Load models, optimizers and schedules from a checkpoint of any layout and return its `state`.

        Learning rate and weight decay follow this run's config at the saved position of the schedule. The
        random generators are restored only if world size and layouts equal those of the save; sampling is
        keyed and does not use them. Plain and distributed optimizers can read each other's checkpoints.

        Raises CheckpointError, before anything is changed, if files are missing, truncated or changed since
        they were written (SHA-256), hold more than a checkpoint needs or come from a newer Megatron-Core, or
        if the models differ; errors after that point report that the models in memory are lost.
        """
        self.finish()
        wanted = None if step == "latest" else step
        manifest = self._once(lambda: folders.read(self.folder, wanted))
        path = folders.path_of(self.folder, manifest["step"])
        self._once(lambda: self._check(path, manifest))
        self._check_sums(path, manifest)
        loaded = self._read(path)
        for name, trained in self.trainables.items():
            tensors.restore(trained, loaded[name], manifest["models"][name]["counters"])
        if manifest["layouts"] == self._layouts():
            self._everywhere(lambda: _restore_rng(_rng_file(path, self._world.rank)))
        self._at = manifest["step"]
        return manifest["state"]

    def _sharded(self, *, loading: bool) -> dict[str, Any]:
        return {name: tensors.sharded(name, t, loading=loading) for name, t in self.trainables.items()}

    def _new_draft(self, step: int) -> Path:
        if self._at is None and (there := [s for s in self.steps() if s >= step]):
            raise CheckpointError(
                f"{self.folder} already has step {there[-1]} of another run, and this one is at {step}: load "
                "it (resume=true), delete it, or use another folder"
            )
        fresh = folders.draft(self.folder, step)
        (fresh / TENSORS).mkdir()
        return fresh

    def _publish(self, manifest: dict[str, Any]) -> None:
        self._once(lambda: self._complete(manifest))
        self._at = manifest["step"]

    def _complete(self, manifest: dict[str, Any]) -> None:
        for later in [s for s in self.steps() if self._at is not None and s > self._at]:
            folders.discard(self.folder, later)
        folders.publish(self._draft, folders.path_of(self.folder, manifest["step"]), manifest)
        folders.retain(self.folder, self.keep_last, self.keep_best)

    def _finalize(self, blocking: bool) -> None:
        with self._saving():
            self._queue.maybe_finalize_async_calls(blocking=blocking)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            return dist_checkpointing.load(self._sharded(loading=True), str(path / TENSORS))  # pyright: ignore
        except (CheckpointException, *LOCAL_FAILURES) as error:
            raise CheckpointError(
                f"loading {path} failed half-way, so that the models in memory are lost: {_reason(error)}. "
                f"Steps in {self.folder}: {self.steps()}"
            ) from error

    def _check(self, path: Path, manifest: dict[str, Any]) -> None:
        """Check on rank 0 that the checkpoint can be read, runs no code, and belongs to these models."""
        check(path, manifest)
        folders.refuse_newer(path, manifest)
        vet(path / TENSORS)
        self._check_models(path, manifest)

    def _check_sums(self, path: Path, manifest: dict[str, Any]) -> None:
        """Check the content of every file, a share on each rank. A checkpoint of an earlier release has no
        sums, which is said."""
        sums = self._once(lambda: folders.summed(path, manifest))
        if sums is None:
            if self._world.rank == 0:
                logging.getLogger(__name__).warning("%s has no checksums: its content is not checked", path)
            return

        def check() -> None:
            try:
                check_sums(path, sums, manifest["files"], self._world.rank, self._world.size)
            except SumsError as error:
                raise CheckpointError(f"{error}. {folders.advice(self.folder, manifest['step'])}") from error

        self._everywhere(check)

    def _check_models(self, path: Path, manifest: dict[str, Any]) -> None:
        saved, ours = manifest["models"], self.trainables
        if saved.keys() != ours.keys():
            raise CheckpointError(f"{path} holds the models {sorted(saved)}, this run trains {sorted(ours)}")
        for name, trained in ours.items():
            # Before 0.19.2 AdamW was the only optimizer, and checkpoints did not name it.
            here, there = tensors.algorithm(trained), saved[name].get("optimizer", "adamw")
            if here != there:
                raise CheckpointError(
                    f"{path} holds the state of {name!r} for optimizer.name: {there}, this run has {here}: "
                    "continue it with that optimizer, or start a new run from its exported weights"
                )
            here, there = described(trained.model.shape), saved[name]["shape"]
            differing = [
                f"{key} {there.get(key)} there, {here.get(key)} here"
                for key in {**here, **there}
                if here.get(key) != there.get(key)
            ]
            if differing:
                first = tensors.first_difference(
                    tensors.weights(name, trained.model),
                    dist_checkpointing.load_tensors_metadata(str(path / TENSORS)),
                )
                raise CheckpointError(
                    f"{path} is of a different model from {name!r}: {', '.join(differing)}; "
                    f"first tensor that differs: {first}"
                )

    def _manifest(self, step: int, state: dict[str, Any], score: float | None) -> dict[str, Any]:
        models = {
            name: {
                "shape": described(trained.model.shape),
                "optimizer": tensors.algorithm(trained),
                "counters": tensors.counters(trained),
            }
            for name, trained in self.trainables.items()
        }
        return {
            "step": step,
            "score": score,
            "layouts": self._layouts(),
            "models": models,
            "versions": {package: version(package) for package in VERSIONED},
            "state": state,
        }

    def _layouts(self) -> dict[str, Any]:
        """World size, and the parallel sizes of each model."""
        sizes = {name: layout_of(trained) for name, trained in self.trainables.items()}
        return {"world": self._world.size, "models": sizes}

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Convert Megatron's errors to CheckpointError, and delete the failed draft from disk."""
        try:
            yield
        except CheckpointException as error:
            raise self._failed(self._world.broadcast_object(_reason(error), 0)) from error
        except CheckpointError as error:
            raise self._failed(str(error)) from error
        except (ConnectionError, EOFError) as error:
            filesystem_async._results_queue = None  # the next save starts another one
            raise self._failed(f"rank {self._world.rank}: {HELPER_ENDED} ({_reason(error)})") from error
        except LOCAL_FAILURES as error:
            # No collective here: other ranks may be anywhere. This process ends, and then theirs fail too.
            raise self._failed(f"rank {self._world.rank}: {_reason(error)}") from error

    def _failed(self, reason: str) -> CheckpointError:
        if self._world.rank == 0:
            shutil.rmtree(self._draft, ignore_errors=True)
        return CheckpointError(
            f"saving {self._draft} failed: {reason} ({folders.room(self.folder)}). Steps that are still "
            f"usable: {self.steps() or 'none'}"
        )

    def _everywhere[T](self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it fails on any, raise CheckpointError on all."""

        def act() -> T:
            try:
                return action()
            except OSError as error:
                raise CheckpointError(f"rank {self._world.rank}: {error}") from error

        return self._world.each(act)

    def _once[T](self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0; return its result, or raise CheckpointError, on every rank."""
        result = self._everywhere(lambda: action() if self._world.rank == 0 else None)
        return self._world.broadcast_object(result, 0)


def layout_of(trained: Trainable) -> dict[str, int]:
    """The parallel sizes of a model."""
    config = trained.model.config
    return {
        "tp": config.tensor_model_parallel_size,
        "pp": config.pipeline_model_parallel_size,
        "vpp": config.virtual_pipeline_model_parallel_size or 1,
        "cp": config.context_parallel_size,
        "ep": config.expert_model_parallel_size,
        "etp": config.expert_tensor_parallel_size or 1,
    }


def _rng_file(path: Path, rank: int) -> Path:
    return path / f"rng_{rank:05d}.json"


def _restore_rng(file: Path) -> None:
    try:
        tensors.restore_rng(file.read_text())
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise damaged(file, f"holds no states of random generators ({error})") from None


def _reason(error: BaseException) -> str:
    if not isinstance(error, CheckpointException):
        return f"{type(error).__name__}: {error}"
    return "; ".join(f"rank {rank}: {_cause(cause)}" for rank, (cause, _) in error.failures.items())


def _cause(cause: BaseException) -> str:
    return f"{WRITER_ENDED} ({cause})" if NO_RESULT in str(cause) else str(cause)


def own_results_queue() -> None:
    """Create the results queue of Megatron's checkpoint writer in its place, with a server process that ends
    when this process is killed: the server that Megatron starts would run forever."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()
