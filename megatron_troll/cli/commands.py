"""The functions of the commands. Heavy imports are inside: reward workers import this module again."""

import gc
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import dump
from megatron_troll.data.rows import DataError
from megatron_troll.launch.local import discard_logs, launch
from megatron_troll.mcore.checkpoint_folder import CheckpointError
from megatron_troll.mcore.layout import world_size
from megatron_troll.observe.opened import load_opened
from megatron_troll.observe.progress import Terminal, show
from megatron_troll.observe.run_folder import CONTINUE, RunFolder, RunFolderError
from megatron_troll.system import (
    FAILED,
    REFUSED,
    Interrupts,
    last_words,
    remove_abandoned,
    watched,
    work_in_temporary_folder,
)

if TYPE_CHECKING:
    from megatron_troll.evals.task import EvalTask
    from megatron_troll.task import Task

# Commands whose runs are not continued, and the sentence about a folder that holds one.
AGAIN = {"sft": "A warm start is not continued", "eval": "An evaluation is not continued"}


class Prepared(Protocol):
    """A validated configuration, with everything it names read."""

    @property
    def config(self) -> Config: ...


@dataclass
class Job[Prep: Prepared]:
    """A command on this process. task: its validated inputs on a rank that is to run it; None in the process
    that started the ranks, and after a refusal. code: the exit code."""

    interrupts: Interrupts
    task: Prep | None = None
    code: int = 0

    @property
    def reports(self) -> bool:
        """Whether this process writes to the terminal: rank 0 alone does."""
        return os.environ["RANK"] == "0"


def train(arguments: Namespace) -> int:
    def prepare(config: Config) -> "Task":
        from megatron_troll.weights.folder import check_target

        task = _task(config)
        if config.checkpoint.export:
            check_target(RunFolder.of(config).hf, Path(config.policy.path))
        return task

    with started(arguments, "train", prepare) as job:
        if job.task is not None:
            from megatron_troll import loop

            if loop.train(job.task, job.interrupts) and job.reports:
                _say_next(job.task.config)
    return job.code


def sft(arguments: Namespace) -> int:
    def prepare(config: Config) -> "Task":
        from megatron_troll.task import sft_of

        sft_of(config)
        return _task(config)

    with started(arguments, "sft", prepare) as job:
        if job.task is not None:
            from megatron_troll.sft import warm_start

            if warm_start(job.task, job.interrupts) and job.reports:
                folder = RunFolder.of(job.task.config)
                exported = job.task.config.checkpoint.export
                _say(f"exported to {folder.hf}" if exported else f"not exported; curves: {folder.report}")
    return job.code


def evaluate(arguments: Namespace) -> int:
    def prepare(config: Config) -> "EvalTask":
        from megatron_troll.evals.task import prepare

        return prepare(config)

    with started(arguments, "eval", prepare) as job:
        if job.task is not None:
            from megatron_troll.evals.report import table
            from megatron_troll.evals.run import evaluate

            results = evaluate(job.task, job.interrupts)
            if results is not None and job.reports:
                Console().print(table(results))
                folder = RunFolder.of(job.task.config)
                _say(f"wrote {folder.evaluation}; every sample: mtroll rollouts {folder.root} --step N")
    return job.code


def preflight(arguments: Namespace) -> int:
    """Check the nodes, with one rank on each; only this node if no launcher started the command."""
    from megatron_troll.preflight.needs import needs_of
    from megatron_troll.preflight.run import examine, failures, table
    from megatron_troll.task import PROBLEMS

    try:
        reports = examine(needs_of(_load(arguments), arguments.serve_nodes))
    except PROBLEMS as error:
        return _refuse(error)
    if os.environ.get("RANK", "0") == "0":
        Console().print(table(reports))
    found = failures(reports)
    for line in found:
        sys.stderr.write(f"{line}\n")
    return FAILED if found else 0


def serve(arguments: Namespace) -> int:
    from megatron_troll.launch.serve import serve as run
    from megatron_troll.launch.servers import ServerFailed
    from megatron_troll.task import PROBLEMS

    try:
        with watched() as interrupts:
            run(_load(arguments), interrupts, _say)
    except PROBLEMS as error:
        return _refuse(error)
    except ServerFailed as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    return 0


def demo(arguments: Namespace) -> int:
    from megatron_troll.data.demo import write_demo

    folder = Path(arguments.folder)
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"{folder} exists already: give another folder, or delete it")
        write_demo(folder, arguments.seed)
    except (ConfigError, OSError) as error:
        return _refuse(error)
    _say(f"wrote the demo task and its model to {arguments.folder}")
    return 0


def report(arguments: Namespace) -> int:
    from megatron_troll.observe.report import report as write

    folders = [Path(run) for run in arguments.runs]
    output = Path(arguments.output) if arguments.output else folders[0] / "report.html"
    try:
        if output.is_dir():
            raise ConfigError(f"--output {output} is a folder: name a file in it")
        write(folders, output)
    except (ConfigError, RunFolderError, OSError) as error:
        return _refuse(error)
    _say(f"wrote {output} and {output.parent / 'curves.png'}")
    return 0


def methods(arguments: Namespace) -> int:
    from megatron_troll.objectives.catalogue import listing

    try:
        sys.stdout.write(listing(arguments.slot))
    except ConfigError as error:
        return _refuse(error)
    return 0


def rollouts(arguments: Namespace) -> int:
    from megatron_troll.observe.browse import browse, html

    root = Path(arguments.run_folder)
    try:
        if arguments.html and Path(arguments.html).is_dir():
            raise RunFolderError(f"--html {arguments.html} is a folder: name a file in it")
        if arguments.html:
            html(root, Path(arguments.html), arguments.step)
            _say(f"wrote {arguments.html}")
        else:
            browse(root, Console(), arguments.step, arguments.sort, arguments.limit)
    except (RunFolderError, OSError) as error:
        return _refuse(error)
    return 0


def _task(config: Config) -> "Task":
    from megatron_troll.task import prepare

    return prepare(config)


@contextmanager
def started[Prep: Prepared](
    arguments: Namespace, name: str, prepare: Callable[[Config], Prep]
) -> Iterator[Job[Prep]]:
    """Read and check, on a rank, what the configuration of a command names; run the block with it, and report
    errors that a user can act on by a message and an exit code. In any other process, start the ranks, which
    get here again, and wait for them."""
    if "RANK" not in os.environ:
        yield Job(Interrupts(), code=_start_ranks(arguments, name, prepare))
        return
    sys.excepthook = _tell_bug
    gc.disable()  # imports and prompts are objects that stay: looking for garbage among them takes seconds
    with watched() as interrupts:
        # Imported inside: the import takes seconds, in which a request to stop must be remembered.
        from megatron_troll.task import PROBLEMS

        job = Job[Prep](interrupts)
        try:
            remove_abandoned()
            work_in_temporary_folder()
            job.task = prepare(_load(arguments))
        except PROBLEMS as error:
            last_words(str(error))
            job.code = REFUSED
            yield job
            return
        from megatron_troll.mcore.cpu.eager import import_megatron

        import_megatron()
        gc.freeze()
        gc.enable()
        with _reported(job):
            yield job


def _start_ranks[Prep: Prepared](arguments: Namespace, name: str, prepare: Callable[[Config], Prep]) -> int:
    """Run a command on ranks of this machine and return its exit code. The ranks check its inputs; only what
    would let their logs into the folder of another run is refused here."""
    try:
        config = _load(arguments)
        folder = RunFolder.of(config)
        folder.check_free()
        if folder.holds_run() and not config.resume:
            # The reason to refuse it may be a default that only the methods know.
            folder.check(dump(prepare(config).config), False, again=AGAIN.get(name, CONTINUE))
    except (ConfigError, DataError, RunFolderError, OSError) as error:
        return _refuse(error)
    ranks = world_size(config)
    argv = [sys.executable, "-P", "-m", "megatron_troll.cli", name, arguments.config, *arguments.overrides]
    threads = config.launch.threads or max(1, (os.cpu_count() or 1) // ranks)
    try:
        code = launch(argv, ranks, threads, folder.logs)
    except OSError as error:
        sys.stderr.write(f"the ranks cannot be started: {error}\n")
        return FAILED
    if code == REFUSED and not folder.was_opened():
        discard_logs(folder.logs, ranks)
    return code


@contextmanager
def _reported(job: Job) -> Iterator[None]:
    """Turn the errors that a run ends with into a message and an exit code."""
    from megatron_troll.rewards.pool import RewardError
    from megatron_troll.rollout.engine import EngineError
    from megatron_troll.training.trainer import Unhealthy

    try:
        yield
    except (RunFolderError, ConfigError, DataError) as error:
        last_words(str(error))
        job.code = REFUSED
    except (CheckpointError, EngineError, RewardError, Unhealthy, OSError) as error:
        last_words(str(error))
        job.code = FAILED


def _tell_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show an error that is a bug where a full disk cannot hide it."""
    last_words("".join(traceback.format_exception(kind, error, trace)).rstrip())


def _load(arguments: Namespace) -> Config:
    return load_opened(arguments.config, arguments.overrides)


def _say_next(config: Config) -> None:
    run = RunFolder.of(config)
    folder, summary = run.root, json.loads(run.summary.read_text())
    before, after = summary["held_out_success_before"], summary["held_out_success_after"]
    exported = f"model in Hugging Face format: {run.hf}\n" if config.checkpoint.export else ""
    _say(
        f"held-out success: {before:.3f} before, {after:.3f} after, {summary['seconds']:.0f} s\n"
        f"{exported}"
        f"curves: {folder / 'curves.png'} and {folder / 'report.html'}\n"
        "next:\n"
        f"  mtroll rollouts {folder}\n"
        f"  mtroll train {folder} name={config.name}-clip objective.trust_region.name=clip\n"
        f"  mtroll report {folder} {folder}-clip"
    )


def _say(text: str) -> None:
    show(Terminal(), text)


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"{error}\n")
    return REFUSED
