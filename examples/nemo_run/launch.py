"""Run `mtroll train` as a nemo-run experiment (docs/nemo-run.md)."""

import argparse
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import nemo_run as run
import psutil
from invoke.exceptions import UnexpectedExit
from recipe import EXECUTORS, Job, recipe
from torchx.specs import AppState

from megatron_troll.config import ConfigError
from megatron_troll.launch.slurm.cli import add_allocation, allocation_of
from megatron_troll.system import ASKING

FAILED, REFUSED = 1, 2


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        made = recipe(arguments.config, arguments.overrides, allocation_of(arguments))
        job = EXECUTORS[arguments.executor](made)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    return (show if arguments.dryrun else start)(made.name, job)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.py", description=__doc__)
    parser.add_argument("executor", choices=EXECUTORS)
    parser.add_argument("config", help="YAML file, as the job will read it")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    parser.add_argument("--dryrun", action="store_true", help="print the scripts, start nothing")
    add_allocation(parser)
    return parser


def start(name: str, job: Job) -> int:
    """A Slurm job is submitted and left; others are waited for, and their output is shown."""
    submitted = isinstance(job.executor, run.SlurmExecutor)
    with run.Experiment(name, executor=job.executor, skip_status_at_exit=submitted) as experiment:
        experiment.add(job.task, name=name)
        if isinstance(job.executor, run.LocalExecutor):
            _hand_on_signals()
        try:
            experiment.run(detach=submitted, tail_logs=not submitted)
        except UnexpectedExit as error:
            sys.stderr.write(f"{error.result.command}: {error.result.stderr}")
            return FAILED
    made = experiment.jobs[0]
    if submitted:
        sys.stdout.write(f"submitted: {made.handle}\n")
        return 0
    return 0 if made.state == AppState.SUCCEEDED else FAILED


def show(name: str, job: Job) -> int:
    """Every script that nemo-run would run, and what it would give a container."""
    with run.Experiment(name, executor=job.executor, clean_mode=True, log_level="WARN") as experiment:
        experiment.add(job.task, name=name)
        experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment._exp_dir)
    made = [*folder.glob("*_sbatch.sh"), *folder.glob("*/scripts/*.sh")]
    if isinstance(job.executor, run.DockerExecutor):
        made += folder.glob("*/configs/*_executor.yaml")
    for path in made:
        sys.stdout.write(f"# {path}\n{path.read_text()}\n")
    shutil.rmtree(folder)
    return 0


def _hand_on_signals() -> None:
    """nemo-run would leave the job behind. It saves and stops when asked, and then this process ends too."""

    def hand_on(number: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        for child in children:
            child.send_signal(number)
        if not children:
            sys.exit(128 + number)

    for number in ASKING:
        signal.signal(number, hand_on)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
