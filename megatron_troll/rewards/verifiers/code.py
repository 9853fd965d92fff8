"""1 if the program in the answer passes its tests, run in a sandbox (rewards/sandbox.py)."""

import json
import re
import secrets
import sys
import time
from typing import Any, Self

from pydantic import Field, model_validator

from megatron_troll.config import PositiveFloat
from megatron_troll.rewards.reward import Reward
from megatron_troll.rewards.sandbox import Finished, Kind, Limits, Sandbox, SandboxError
from megatron_troll.types import Prompt

BLOCK = re.compile(r"^```python[^\S\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)

# The tests are read from stdin only after the answer has run, and the token in the last line proves that
# they passed: exiting early or printing text does not. An answer that looks for the tests can find them.
ASSERT = """
import json, sys
answer = {"__name__": "answer"}
exec(compile(%r, "answer.py", "exec"), answer)
test, passed = json.load(sys.stdin)
exec(compile(test, "test.py", "exec"), answer)
sys.stdout.write("\\n" + passed)
"""


class Code(Reward):
    """Runs the last ```python block of the answer against `tests` of the prompt's record: each is a string of
    assert lines, or {"input": ..., "output": ...} for stdin and stdout. Every test is a separate run.

    Outputs are compared line by line without trailing white space. An answer without a block gets 0.
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
        tests = [_Test(test, prompt.id) for test in self._tests(prompt)]
        program = extract(text)
        if program is None:
            return 0.0
        deadline, passed = time.monotonic() + self.wall_s, 0
        for test in tests:
            left = deadline - time.monotonic()
            if left > 0 and test.passes(program, self._sandbox(), left):
                passed += 1
            elif not self.partial:
                return 0.0
        return passed / len(tests)

    def _tests(self, prompt: Prompt) -> list[Any]:
        found = prompt.record.get(self.tests)
        if not isinstance(found, list) or not found:
            raise ValueError(f"prompt {prompt.id!r}: record field {self.tests!r} must be a list of tests")
        return found


def extract(text: str) -> str | None:
    """The last ```python block of an answer; None if it has none."""
    blocks = BLOCK.findall(text)
    return blocks[-1] if blocks else None


class _Test:
    """One test of a record. Raises ValueError if it has neither form."""

    def __init__(self, test: Any, prompt: str):
        pair = isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output"))
        if not pair and not isinstance(test, str):
            raise ValueError(
                f"prompt {prompt!r}: a test must be assert lines, or input and output; got {test!r:.80}"
            )
        self._test = test

    def passes(self, program: str, sandbox: Sandbox, wall_s: float) -> bool:
        if isinstance(self._test, str):
            passed = secrets.token_hex(16)
            stdin = json.dumps([self._test, passed])
            finished = sandbox.run(ASSERT % program, stdin, wall_s)
            return _ended_well(finished) and finished.output.endswith("\n" + passed)
        finished = sandbox.run(program, self._test["input"], wall_s)
        return _ended_well(finished) and _lines(finished.output) == _lines(self._test["output"])


def _ended_well(finished: Finished) -> bool:
    return finished.code == 0 and not finished.timed_out


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]
