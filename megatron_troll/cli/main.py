"""`mtroll`: the command line."""

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO, cast

from megatron_troll.cli import commands
from megatron_troll.convert import cli as convert
from megatron_troll.launch.plan import cli as plan
from megatron_troll.launch.slurm import cli as launch
from megatron_troll.study import cli as study
from megatron_troll.terminal import ShowingStream

INTERRUPTED = 130


class Parser(study.StudyParser):
    """Accepts options and positionals in any order: plain argparse takes no override after an option."""

    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore
        if self._mixing or any(action.nargs == argparse.PARSER for action in self._actions):
            return super().parse_known_args(args, namespace)
        self._mixing = True  # argparse's intermixed parser calls this method again, once for each kind
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done (or stopped on request, resumable), 1 failed, 2
    refused before anything was done."""
    # Megatron-Core warns of every optional package that a CPU machine lacks; torch of what Megatron calls,
    # and of a CUDA toolkit without a GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    for kind in (UserWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=kind, module=r"(megatron|torch)\.")
    if not isinstance(sys.stderr, ShowingStream):
        sys.stderr = cast(TextIO, ShowingStream(sys.stderr))  # errors and tracebacks quote files and answers
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="mtroll", description="RL post-training on Megatron-Core.")
    kinds = top.add_subparsers(required=True, metavar="COMMAND")
    _configured(kinds, "train", "train a policy by RL", commands.train)
    _configured(kinds, "sft", "warm-start a model on demonstrations", commands.sft)
    _configured(kinds, "eval", "pass@k and maj@k of a model on prompt files", commands.evaluate)
    preflight = _configured(kinds, "preflight", "check the nodes that a run will have", commands.preflight)
    preflight.add_argument(
        "--serve-nodes",
        type=launch.natural,
        default=0,
        help="number of nodes, from the first, that serve (default 0)",
    )
    plan.add_to(kinds)
    launch.add_to(kinds)
    _configured(kinds, "serve", "start SGLang servers for a run and keep them running", commands.serve)
    demo = kinds.add_parser("demo", help="write the demo task: prompts, demonstrations, a tiny model")
    demo.add_argument("folder", nargs="?", default="runs/demo")
    demo.add_argument("--seed", type=launch.natural, default=0)
    demo.set_defaults(run=commands.demo)
    report = kinds.add_parser("report", help="compare runs in one HTML page")
    report.add_argument("runs", nargs="+", metavar="RUN")
    report.add_argument("--output", default=None, help="default: report.html in the first run's folder")
    report.set_defaults(run=commands.report)
    methods = kinds.add_parser("methods", help="the methods of every slot, and what each goes with")
    methods.add_argument(
        "slot", nargs="?", metavar="SLOT", help="advantage, ratio, trust_region, kl, correction"
    )
    methods.set_defaults(run=commands.methods)
    rollouts = kinds.add_parser("rollouts", help="browse prompts, answers, rewards and log-probs")
    rollouts.add_argument("run_folder", metavar="RUN")
    rollouts.add_argument("--step", type=launch.natural, default=None, help="default: the last")
    rollouts.add_argument(
        "--sort", default="reward", help="reward, advantage, logp or length; --sort=-reward: smallest first"
    )
    rollouts.add_argument("--limit", type=launch.natural, default=20, help="rollouts listed (default 20)")
    rollouts.add_argument("--html", default=None, metavar="FILE", help="write an HTML page instead")
    rollouts.set_defaults(run=commands.rollouts)
    study.add_to(kinds)
    convert.add_to(kinds)
    return top


def _configured(
    kinds: "argparse._SubParsersAction", name: str, what: str, run: object
) -> argparse.ArgumentParser:
    command = kinds.add_parser(name, help=what, description=f"{what}: a YAML file and overrides.")
    command.add_argument("config", help="YAML file, or a run folder to run again")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value")
    command.set_defaults(run=run)
    return command
