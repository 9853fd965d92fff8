"""`mtroll study`: run, report, kl."""

import argparse
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from shlex import quote
from typing import Any

from megatron_troll.config import ConfigError
from megatron_troll.system import FAILED, REFUSED
from megatron_troll.terminal import shown

KINDS = ("run", "report", "kl")
K = "1,2,4,8,16,32,64,128,256"


class StudyParser(argparse.ArgumentParser):
    """Parser that reads `mtroll study FILE.yaml` as `mtroll study run FILE.yaml`."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        files = [word for word in args or [] if word.endswith((".yaml", ".yml"))]
        if files and self.prog.endswith(" study") and args[0] not in KINDS:
            args = ["run", *args]
        return super().parse_known_args(args, namespace)


def add_to(commands: "argparse._SubParsersAction") -> None:
    """Add the command `study` and its sub-commands."""
    about = "many runs planned in one file: methods x seeds x settings"
    study = commands.add_parser("study", help=about, description=about)
    kinds = study.add_subparsers(required=True, metavar="|".join(KINDS))
    run = kinds.add_parser("run", help="run all unfinished runs; short form: `mtroll study STUDY.yaml`")
    run.add_argument("study", metavar="STUDY.yaml")
    run.add_argument("--jobs", type=int, default=1, help="runs at once (default 1)")
    run.set_defaults(run=run_command)
    report = kinds.add_parser("report", help="compare the runs: write a page of tables and curves")
    report.add_argument("study", metavar="STUDY.yaml")
    report.add_argument("--output", default=None, help="default: runs/<study>/report.md")
    report.set_defaults(run=report_command)
    kl = kinds.add_parser("kl", help="bias, spread and cost of the estimators of KL(policy || reference)")
    kl.add_argument("config", help="YAML file with models.policy and models.reference")
    kl.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    kl.add_argument("--k", type=integers, default=K, metavar="K,...", help=f"k of TIKE (default: {K})")
    kl.add_argument("--output", default="kl-estimators.md", help="a page; figures go to .json and images/")
    kl.set_defaults(run=kl_command)


def integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def run_command(arguments: Namespace) -> int:
    from megatron_troll.study.plan import load_plan
    from megatron_troll.study.results import results_path
    from megatron_troll.study.runner import run_study
    from megatron_troll.system import watched

    path = Path(arguments.study)
    with watched() as interrupts:
        try:
            complete = run_study(load_plan(path), results_path(path), arguments.jobs, interrupts, _say)
        except ConfigError as error:
            return _refuse(error)
    if complete:
        _say(f"all runs are finished; compare: mtroll study report {path}")
        return 0
    _say(f"not every run is finished; go on: mtroll study {path}")
    return 0 if interrupts.asked else FAILED


def report_command(arguments: Namespace) -> int:
    from megatron_troll.study.plan import load_plan
    from megatron_troll.study.plots import plot, plot_survival
    from megatron_troll.study.report import collapsing, markdown
    from megatron_troll.study.results import gather, results_path
    from megatron_troll.system import write_atomic

    path = Path(arguments.study)
    try:
        plan = load_plan(path)
    except ConfigError as error:
        return _refuse(error)
    results = gather(plan, results_path(path))
    if not results:
        return _refuse(ConfigError(f"{path}: no finished run; first: mtroll study {path}"))
    output = Path(arguments.output) if arguments.output else plan.root / "report.md"
    pictures = f"images/{output.stem}-{{setting}}.png"
    for setting in {cell.setting for cell in results}:
        plot(plan, setting, results, output.parent / pictures.format(setting=setting))
    for setting in collapsing(plan, results.values()):
        picture = pictures.format(setting=f"{setting}-survival")
        plot_survival(plan, setting, results, output.parent / picture)
    write_atomic(output, markdown(plan, results, str(path), pictures))
    _say(f"wrote {output}")
    return 0


def kl_command(arguments: Namespace) -> int:
    from megatron_troll.observe.opened import load_opened
    from megatron_troll.study.kl_report import analyse, write
    from megatron_troll.study.pool import draw_pool
    from megatron_troll.task import PROBLEMS, prepare

    try:
        pool = draw_pool(prepare(load_opened(arguments.config, arguments.overrides)))
    except PROBLEMS as error:
        return _refuse(error)
    words = ["mtroll study kl", arguments.config, *map(quote, arguments.overrides)]
    command = " ".join([*words, "--output", arguments.output])
    write(analyse(pool, arguments.k), Path(arguments.output), command, f"{datetime.now(UTC):%Y-%m-%d}")
    _say(f"wrote {arguments.output}")
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{shown(text)}\n")
    sys.stdout.flush()


def _refuse(error: Exception) -> int:
    sys.stderr.write(f"{error}\n")
    return REFUSED
