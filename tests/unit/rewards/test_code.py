"""Answers that are programs, judged by the tests of their prompt."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from megatron_troll.config import ConfigError, RewardConfig
from megatron_troll.rewards import sandbox
from megatron_troll.rewards.pool import RewardError
from megatron_troll.rewards.reward import build
from megatron_troll.rewards.score import Scorer
from megatron_troll.types import Prompt, Rollout
from tests.faults import signal_helpers

DOUBLE = [{"input": "2\n", "output": "4\n"}, {"input": "-3\n", "output": "-6"}]
SQUARE = ["assert square(3) == 9", "x = square(-2)\nassert x == 4"]


def config(**fields: object) -> RewardConfig:
    return RewardConfig.model_validate({"name": "code"} | fields)


def answer(program: str) -> str:
    return f"Let me think.\n```python\n{program}\n```\nThat is it."


@pytest.fixture(scope="module")
def judge():
    return build(config())


@pytest.fixture(scope="module")
def partial():
    return build(config(partial=True, wall_s=3.0))


def prompt(tests: object) -> Prompt:
    return Prompt("p", (), "-", {"tests": tests})


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print(2 * int(input()))", 1.0),
        ("print(str(2 * int(input())) + '  ')\nprint()", 1.0),
        ("print(int(input()) ** 2)", 0.0),
        ("print(2 * int(input())); raise SystemExit(1)", 0.0),
        ("print(2 * int(input())", 0.0),
        ("", 0.0),
    ],
)
def test_stdin_and_stdout(judge, program, expected):
    assert judge(answer(program), prompt(DOUBLE)) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def square(x): return x * x", 1.0),
        ("def square(x):\n    print('hello', end='')\n    return x * x", 1.0),
        ("def square(x): return x * x\nif __name__ == '__main__': square(input())", 1.0),
        ("def square(x): return 9", 0.0),
        ("def square(x): raise SystemExit", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("raise SystemExit", 0.0),
        ("cube = 3", 0.0),
    ],
)
def test_assert_lines(judge, program, expected):
    """Leaving early is not passing."""
    assert judge(answer(program), prompt(SQUARE)) == expected


def test_an_answer_without_a_program_gets_nothing(judge):
    assert judge("I do not know.", prompt(DOUBLE)) == 0.0


def test_partial_credit(partial):
    assert partial(answer("print(4)"), prompt(DOUBLE)) == 0.5
    assert partial(answer("print(2 * int(input()))"), prompt(DOUBLE)) == 1.0


def test_all_tests_share_the_time(partial):
    """The first test uses it up; the second, which would pass, is not run."""
    text = answer("x = int(input())\nif x > 0:\n    import time; time.sleep(60)\nprint(2 * x)")
    assert partial(text, prompt(DOUBLE)) == 0.0


@pytest.mark.parametrize("tests", [None, [], "assert True", [3], [{"input": "x"}]])
def test_a_prompt_without_usable_tests_is_refused(judge, tests):
    with pytest.raises(ValueError, match="must be "):
        judge.check(prompt(tests))


@pytest.mark.parametrize("test", ["assert f(1", "# later", "", "assert f('\0')"])
def test_assert_lines_that_test_nothing_are_refused(judge, test):
    with pytest.raises(ValueError, match="a test "):
        judge.check(prompt(["assert f(1)", test]))


HUMAN_EVAL = "METADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    assert candidate(1) == 2\n"


@pytest.mark.parametrize(
    ("test", "said"),
    [
        (HUMAN_EVAL, "it never calls check"),
        ("class Tests:\n    def test_f(self):\n        assert f(1) == 2", "it has no assert"),
        ("f(1) == 2", "it compares without assert"),
        ("x = f(1)\nx == 2 and not f(3)", "it compares without assert"),
        ("for x in (1, 2):\n    f(x) == x", "it compares without assert"),
        ("x = 3", "it has no assert"),
        ("g = lambda: f(1)", "it has no assert"),
        ("assert True", "it has no assert"),
        ("assert (f(1) == 2, 'f of 1')", "an assert of a tuple is always true"),
        ({"input": "1", "output": ""}, "its output is blank"),
        ({"input": "1", "output": " \n"}, "its output is blank"),
    ],
)
def test_a_test_that_every_answer_passes_is_refused(judge, test, said):
    with pytest.raises(ValueError, match=f"a test checks nothing: {said}: "):
        judge.check(prompt(["assert f(1)", test]))


@pytest.mark.parametrize(
    "test",
    [
        HUMAN_EVAL + "\ncheck(f)",
        "f(1)",
        "x = f(1)",
        "f(1) == 2 or fail()",
        "if f(1) != 2:\n    raise ValueError",
        "try:\n    f(1)\n    assert False\nexcept ValueError:\n    pass",
        "for x, y in ((1, 2), (3, 4)):\n    assert f(x) == y",
        "with g() as x:\n    assert x",
        {"input": "", "output": "2"},
    ],
)
def test_a_test_that_an_answer_can_fail_is_accepted(judge, test):
    judge.check(prompt([test]))


def rollout(text: str, sample: int = 0) -> Rollout:
    nothing = np.zeros(0, dtype=np.int32)
    return Rollout(prompt(DOUBLE), 0, sample, *[nothing] * 4, 0, None, text, "stop", 1.0)


def test_through_the_workers():
    texts = [answer("print(2 * int(input()))"), answer("while True: pass"), "no"]
    asked_for = config(timeout_s=60.0, wall_s=5.0, limits={"cpu_s": 1})
    with Scorer(asked_for, workers=2) as scorer:
        scores = scorer.score([rollout(text, i) for i, text in enumerate(texts)])
    assert scores.reward.tolist() == [1, 0, 0]
    assert (scores.timeouts, scores.crashes) == (0, 0)


@pytest.mark.parametrize("tests", [DOUBLE, SQUARE])
def test_a_sandbox_that_cannot_be_set_up_is_no_fault_of_the_answer(tests):
    name = "tests.unit.rewards.plugin_rewards:LosesItsFolder"
    asked = Rollout(**(vars(rollout(answer("print(4)"))) | {"prompt": prompt(tests)}))
    said = "the sandbox cannot be set up: .*No such file or directory: '/no/such/folder"
    ends = pytest.raises(RewardError, match=rf"failed on p#0:\n{said}")
    with Scorer(config(name=name, timeout_s=60.0), workers=1) as scorer, ends:
        scorer.score([asked])


def test_without_a_sandbox_nothing_is_built(monkeypatch):
    monkeypatch.setattr(sandbox, "visible", lambda python: ["/no/such/folder"])
    with pytest.raises(ConfigError, match=r"namespaces does not work here: .*reward\.sandbox=limits"):
        build(config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wall_s": 0.0}, r"reward.wall_s: got 0.0, expected a number > 0"),
        ({"limits": {"memory_mb": 1}}, r"reward.limits.memory_mb: got 1, expected an integer >= 64"),
        ({"sandbox": "none"}, "reward.sandbox: .*one of namespaces, limits"),
        ({"python": "/no/such/python"}, "'/no/such/python' does not start"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        build(config(**fields))


def test_a_signal_to_every_process_of_a_job_changes_no_score():
    """In a process of its own, since everything that this one started would get it."""
    program = "from tests.unit.rewards.test_code import score_while_asked; score_while_asked()"
    subprocess.run([sys.executable, "-c", program], check=True)


def score_while_asked() -> None:
    """Signals come from before the answer is confined until it is run."""

    def ask() -> None:
        while not any("main.py" in command for command in signal_helpers()):
            time.sleep(0.001)

    slow = answer("import time\ntime.sleep(0.5)\nprint(2 * int(input()))")
    with Scorer(config(), workers=1) as scorer:
        scorer.score([rollout("no program")])
        for _ in range(5):
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            assert scorer.score([rollout(slow)]).reward.tolist() == [1.0]
            asking.join()
