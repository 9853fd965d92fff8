"""Run `mtroll train` as a nemo-run experiment: .venv-nemo/bin/python examples/nemo_run/launch.py EXECUTOR CONFIG"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import nemo_run as run
from torchx.specs import AppState

from examples.nemo_run.recipe import EXECUTORS, Job, recipe
from megatron_troll.config import ConfigError
from megatron_troll.launch.slurm.cli import add_allocation, allocation_of

FAILED, REFUSED = 1, 2


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    try:
        made = recipe(arguments.config, arguments.overrides, allocation_of(arguments))
        job = EXECUTORS[arguments.executor](made)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return REFUSED
    if arguments.dryrun:
        return show(made.name, job)
    return start(made.name, job)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch.py", description=__doc__)
    parser.add_argument("executor", choices=EXECUTORS)
    parser.add_argument("config", help="YAML file, as the job will read it")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--dryrun", action="store_true", help="print the scripts, start nothing")
    add_allocation(parser)
    return parser


def start(name: str, job: Job) -> int:
    """A Slurm job is submitted and left; others are waited for, and their output is shown."""
    detached = isinstance(job.executor, run.SlurmExecutor)
    with run.Experiment(name, executor=job.executor, skip_status_at_exit=detached) as experiment:
        experiment.add(job.task, name=name)
        experiment.run(detach=detached, tail_logs=not detached)
    return 0 if detached or experiment.jobs[0].state == AppState.SUCCEEDED else FAILED


def show(name: str, job: Job) -> int:
    """Every file that nemo-run would run or read."""
    with run.Experiment(name, executor=job.executor, skip_status_at_exit=True) as experiment:
        experiment.add(job.task, name=name)
        experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment._exp_dir)
    for path in (*sorted(folder.glob("*_sbatch.sh")), *sorted(folder.glob("*/scripts/*.sh"))):
        sys.stdout.write(f"# {path}\n{path.read_text()}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
