"""The functions of the commands. Heavy imports are inside: reward workers import this module again."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from megatron_troll.config import Config, ConfigError
from megatron_troll.config.load import dump, load
from megatron_troll.config.paths import RunPaths
from megatron_troll.launch.local import launch
from megatron_troll.observe.run_folder import RunFolder, RunFolderError
from megatron_troll.system import Interrupts, watched

if TYPE_CHECKING:
    from megatron_troll.evals.task import EvalTask
    from megatron_troll.task import Task

FAILED, REFUSED = 1, 2


class Prepared(Protocol):
    """A validated configuration, with everything it names read; its str() is printed to the terminal."""

    @property
    def config(self) -> Config: ...


def train(arguments: Namespace) -> int:
    def run(task: "Task", interrupts: Interrupts) -> None:
        from megatron_troll.loop import train as loop

        if loop(task, interrupts) and os.environ["RANK"] == "0":
            _say_next(task.config)

    return _configured(arguments, Command("train", _task, lambda task: None, run))


def sft(arguments: Namespace) -> int:
    def check(task: "Task") -> None:
        from megatron_troll.task import demonstrations

        demonstrations(task)

    def run(task: "Task", interrupts: Interrupts) -> None:
        from megatron_troll.sft import warm_start

        if warm_start(task, interrupts) and os.environ["RANK"] == "0":
            _say(f"exported to {_folder(task.config).hf}")

    return _configured(arguments, Command("sft", _task, check, run))


def evaluate(arguments: Namespace) -> int:
    def prepare(config: Config) -> "EvalTask":
        from megatron_troll.evals.task import prepare

        return prepare(config)

    def run(task: "EvalTask", interrupts: Interrupts) -> None:
        from megatron_troll.evals.report import table
        from megatron_troll.evals.run import evaluate

        results = evaluate(task, interrupts)
        if results is not None and os.environ["RANK"] == "0":
            Console().print(table(results))
            folder = _folder(task.config)
            _say(f"wrote {folder.evaluation}; every sample: mtroll rollouts {folder.root} --step N")

    return _configured(arguments, Command("eval", prepare, lambda task: None, run))


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

    write_demo(arguments.folder, arguments.seed)
    _say(f"wrote the demo task and its model to {arguments.folder}")
    return 0


def report(arguments: Namespace) -> int:
    from megatron_troll.observe.report import report as write
    from megatron_troll.observe.runs import NoMetricsError

    folders = [Path(run) for run in arguments.runs]
    output = Path(arguments.output) if arguments.output else folders[0] / "report.html"
    try:
        write(folders, output)
    except NoMetricsError as error:
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
        if arguments.html:
            html(root, Path(arguments.html), arguments.step)
            _say(f"wrote {arguments.html}")
        else:
            browse(root, Console(), arguments.step, arguments.sort, arguments.limit)
    except RunFolderError as error:
        return _refuse(error)
    return 0


@dataclass(frozen=True)
class Command[Prep: Prepared]:
    """A command on a configuration. prepare: reads and validates on every rank; check: further validation,
    before ranks start; run: the work of each rank."""

    name: str
    prepare: Callable[[Config], Prep]
    check: Callable[[Prep], object]
    run: Callable[[Prep, Interrupts], None]


def _task(config: Config) -> "Task":
    from megatron_troll.task import prepare

    return prepare(config)


def _configured[Prep: Prepared](arguments: Namespace, command: Command[Prep]) -> int:
    """Check the configuration; then run as a rank, or start the ranks, which check it again."""
    if "RANK" in os.environ:
        return _as_rank(arguments, command)
    from megatron_troll.checks import world_size
    from megatron_troll.task import PROBLEMS

    try:
        task = command.prepare(_load(arguments))
        command.check(task)
        folder = _folder(task.config)
        folder.check(dump(task.config), task.config.resume)
        folder.logs.mkdir(parents=True, exist_ok=True)
    except (*PROBLEMS, RunFolderError) as error:
        return _refuse(error)
    ranks = world_size(task.config)
    argv = [
        sys.executable,
        "-m",
        "megatron_troll.cli",
        command.name,
        arguments.config,
        *arguments.overrides,
    ]
    threads = task.config.launch.threads or max(1, (os.cpu_count() or 1) // ranks)
    _say(str(task))
    return launch(argv, ranks, threads, folder.logs)


def _as_rank[Prep: Prepared](arguments: Namespace, command: Command[Prep]) -> int:
    with watched() as interrupts:
        from megatron_troll.task import PROBLEMS

        try:
            task = command.prepare(_load(arguments))
        except PROBLEMS as error:
            return _refuse(error)
        return _run(task, command, interrupts)


def _run[Prep: Prepared](task: Prep, command: Command[Prep], interrupts: Interrupts) -> int:
    from megatron_troll.data.rows import DataError
    from megatron_troll.mcore.checkpoint_folder import CheckpointError
    from megatron_troll.rewards.pool import RewardError
    from megatron_troll.rollout.engine import EngineError
    from megatron_troll.training.trainer import Unhealthy

    try:
        command.run(task, interrupts)
    except (RunFolderError, ConfigError, DataError) as error:
        return _refuse(error)
    except (CheckpointError, EngineError, RewardError, Unhealthy, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return FAILED
    return 0


def _load(arguments: Namespace) -> Config:
    path = Path(arguments.config)
    return load(RunPaths(path).config if path.is_dir() else path, arguments.overrides)


def _folder(config: Config) -> RunFolder:
    return RunFolder.of(config)


def _say_next(config: Config) -> None:
    run = _folder(config)
    folder, summary = run.root, json.loads(run.summary.read_text())
    before, after = summary["held_out_success_before"], summary["held_out_success_after"]
    _say(
        f"held-out success: {before:.3f} before, {after:.3f} after, {summary['seconds']:.0f} s\n"
        f"checkpoint in Hugging Face format: {folder / 'hf'}\n"
        f"curves: {folder / 'curves.png'} and {folder / 'report.html'}\n"
        "next:\n"
        f"  mtroll rollouts {folder}\n"
        f"  mtroll train {folder} name={config.name}-clip objective.trust_region.name=clip\n"
        f"  mtroll report {folder} {folder}-clip"
    )


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"{error}\n")
    return REFUSED
