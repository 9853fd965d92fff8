"""1 if the program in the answer passes its tests, run in a sandbox (rewards/sandbox.py)."""

import inspect
import json
import secrets
import socket
import sys
import time
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from megatron_troll.config import PositiveFloat
from megatron_troll.rewards.blocks import extract
from megatron_troll.rewards.judging import lint, sides, wire
from megatron_troll.rewards.reward import Reward
from megatron_troll.rewards.sandbox import Finished, Kind, Limits, Sandbox, SandboxError, starting
from megatron_troll.types import Prompt

# The sources of both sides, by their path in the sandbox; standard library only.
PROGRAM = {
    f"megatron_troll/rewards/judging/{Path(str(module.__file__)).name}": inspect.getsource(module)
    for module in (sides, wire)
}
MAIN = """
import sys
sys.path.insert(0, ".")
from megatron_troll.rewards.judging.sides import {side}
sys.path.pop(0)
{side}({descriptor})
"""


class Code(Reward):
    """Runs the program of the answer (rewards/blocks.py) against `tests` of the prompt's record: each is a
    string of assert lines, or {"input": ..., "output": ...} for stdin and stdout, and a separate run.

    Assert lines run in a process of their own, to which the answer gives values of plain types
    (judging/sides.py). Outputs are compared line by line without trailing white space.
    """

    sandbox: Kind = Field(
        default="namespaces", description="limits: weaker, for machines that forbid namespaces"
    )
    limits: Limits = Limits()
    python: str | None = Field(
        default=None, description="interpreter of the answers; default: that of the run"
    )
    wall_s: PositiveFloat = Field(
        default=8.0, description="seconds for all tests of one answer; keep it below timeout_s"
    )
    tests: str = Field(default="tests", description="field of the prompt's record that holds the tests")
    partial: bool = Field(default=False, description="the share of tests passed, in place of all or nothing")

    @model_validator(mode="after")
    def _sandbox_works(self) -> Self:
        try:
            self._sandbox().probe()
        except SandboxError as error:
            hint = "" if self.sandbox == "limits" else "; reward.sandbox=limits confines careless code only"
            raise ValueError(f"sandbox: {self.sandbox} does not work here: {error}{hint}") from error
        return self

    def _sandbox(self) -> Sandbox:
        return Sandbox(self.sandbox, self.limits, self.python or sys.executable)

    def __call__(self, text: str, prompt: Prompt) -> float:
        tests = self._tests(prompt)
        deadline, passed = time.monotonic() + self.wall_s, 0
        for test in tests:
            left = deadline - time.monotonic()
            program = extract(text, runs=test.runs)
            if program is None:
                return 0.0
            if left > 0 and test.passes(program, self._sandbox(), left):
                passed += 1
            elif not self.partial:
                return 0.0
        return passed / len(tests)

    def check(self, prompt: Prompt) -> None:
        for test in self._tests(prompt):
            test.check()

    def _tests(self, prompt: Prompt) -> list["_Test"]:
        found = prompt.record.get(self.tests)
        if not isinstance(found, list) or not found:
            raise ValueError(f"record field {self.tests!r} must be a list of tests, got {found!r:.80}")
        return [_Test(test) for test in found]


class _Test:
    """One test of a record. Raises ValueError if it has neither form."""

    def __init__(self, test: Any):
        pair = isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output"))
        if not pair and not isinstance(test, str):
            raise ValueError(f"a test must be assert lines, or input and output; got {test!r:.80}")
        self._test = test
        self.runs = pair

    def check(self) -> None:
        """Raise ValueError for a test that no answer can pass, or that checks nothing."""
        if isinstance(self._test, dict):
            if not self._test["output"].strip():
                raise ValueError(f"a test checks nothing: its output is blank: {self._test!r:.80}")
            return
        try:
            found = lint.problem(self._test)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(f"a test is not Python: {error}: {self._test!r:.80}") from error
        if found is not None:
            raise ValueError(f"a test checks nothing: {found}: {self._test!r:.80}")

    def passes(self, program: str, sandbox: Sandbox, wall_s: float) -> bool:
        if isinstance(self._test, str):
            return _judged(self._test, program, sandbox, wall_s)
        finished = sandbox.run(program, self._test["input"], wall_s)
        return _ended_well(finished) and _lines(finished.output) == _lines(self._test["output"])


def _judged(test: str, program: str, sandbox: Sandbox, wall_s: float) -> bool:
    """Whether the program passes assert lines. The judge proves it with a word that only it is given."""
    passed = secrets.token_hex(16)
    with starting():
        here, there = socket.socketpair()
    with here, there:
        serving = _side("serve", here.fileno()) | {"answer.py": program}
        judging = _side("judge", there.fileno())
        with (
            sandbox.started(serving, "", wall_s, here.fileno()),
            sandbox.started(judging, json.dumps([test, passed]), wall_s, there.fileno()) as judge,
        ):
            here.close()
            there.close()
            finished = judge.finished()
    return _ended_well(finished) and finished.output.endswith("\n" + passed)


def _side(side: str, descriptor: int) -> dict[str, str]:
    return PROGRAM | {"main.py": MAIN.format(side=side, descriptor=descriptor)}


def _ended_well(finished: Finished) -> bool:
    return finished.code == 0 and not finished.timed_out


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
