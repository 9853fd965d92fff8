"""What the commands do. Heavy imports are inside: reward workers import this module's main again."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_troll.config import Config
from megatron_troll.config.load import load
from megatron_troll.launch.local import launch

if TYPE_CHECKING:
    from megatron_troll.checks import Task

REFUSED = 2


def train(arguments: Namespace) -> int:
    def run(task: "Task") -> None:
        from megatron_troll.loop import train as loop

        if loop(task) and os.environ["RANK"] == "0":
            _say_next(task.config)

    return _configured(arguments, "train", run)


def sft(arguments: Namespace) -> int:
    def run(task: "Task") -> None:
        from megatron_troll.warm_start import warm_start

        if warm_start(task) and os.environ["RANK"] == "0":
            _say(f"exported to {_folder(task.config) / 'hf'}")

    return _configured(arguments, "sft", run)


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


def rollouts(arguments: Namespace) -> int:
    from megatron_troll.observe.browse import browse, html
    from megatron_troll.observe.run_folder import RunFolderError

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


def _configured(arguments: Namespace, command: str, run: Callable[["Task"], None]) -> int:
    """Check the configuration; then be a rank, or start the ranks that will check it again."""
    from megatron_troll.checks import PROBLEMS, prepare, world_size

    try:
        task = prepare(_load(arguments))
    except PROBLEMS as error:
        return _refuse(error)
    if "RANK" in os.environ:
        return _as_rank(task, run)
    ranks = world_size(task.config)
    argv = [sys.executable, "-m", "megatron_troll.cli", command, arguments.config, *arguments.overrides]
    threads = task.config.launch.threads or max(1, (os.cpu_count() or 1) // ranks)
    _say(str(task.prompts))
    return launch(argv, ranks, threads, _folder(task.config) / "logs")


def _as_rank(task: "Task", run: Callable[["Task"], None]) -> int:
    from megatron_troll.observe.run_folder import RunFolderError

    try:
        run(task)
    except RunFolderError as error:
        return _refuse(error)
    return 0


def _load(arguments: Namespace) -> Config:
    path = Path(arguments.config)
    return load(path / "config.yaml" if path.is_dir() else path, arguments.overrides)


def _folder(config: Config) -> Path:
    return Path(config.runs) / config.name


def _say_next(config: Config) -> None:
    folder = _folder(config)
    _say(
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
