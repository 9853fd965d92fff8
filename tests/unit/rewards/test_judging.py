"""Answers tried on assert lines: right ones of many kinds pass, forged ones do not."""

import pytest

from megatron_troll.config import RewardConfig
from megatron_troll.rewards.reward import build
from megatron_troll.types import Prompt

JUDGE = build(RewardConfig.model_validate({"name": "code", "wall_s": 30.0}))
NINE = "assert f(3) == 9"


def reward(program: str, *tests: str) -> float:
    return JUDGE(f"```python\n{program}\n```", Prompt("p", (), "-", {"tests": list(tests)}))


EQUAL = "class Equal:\n    def __eq__(self, other): return True\n    __ne__ = __lt__ = __eq__\n"
FORGED = {
    "an object that equals everything": EQUAL + "def f(x): return Equal()",
    "in a list": EQUAL + "def f(x): return [Equal()]",
    "a number that equals everything": "class N(int):\n    __eq__ = lambda a, b: True\ndef f(x): return N(1)",
    "a text that equals everything": "class S(str):\n    __eq__ = lambda a, b: True\ndef f(x): return S('1')",
    "a difference that is always 0": "class Z:\n    __sub__ = lambda a, b: 0\ndef f(x): return Z()",
    "a module in its place": "from unittest.mock import ANY\ndef f(x): return ANY",
    "a mock": "from unittest.mock import MagicMock as M\nf = M()\nf.return_value.__eq__ = lambda a, b: True",
    "it leaves": "import sys\ndef f(x): sys.exit(0)",
    "it leaves at once": "import os\ndef f(x): os._exit(0)",
    "it leaves at the end": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 8",
    "it leaves when loaded": "raise SystemExit(0)",
    "it reads what the judge reads": "import sys\nprint(sys.stdin.read())\ndef f(x): return 8",
    "it reads every file": (
        "import glob, re\nseen = ' '.join(open(p, errors='replace').read() for p in glob.glob('/box/*.*'))\n"
        "def f(x): return int(re.search(r'== (9)', seen)[1])"
    ),
    "it searches the frames": (
        "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for v in frame.f_locals.values():\n"
        "            if isinstance(v, str) and '== 9' in v: return 9\n"
        "        frame = frame.f_back\n    return 8"
    ),
    "it writes on every descriptor": (
        "import os\ndef f(x):\n    for d in range(3, 200):\n"
        "        try: os.write(d, b'[\"value\", null, [], {}]\\n')\n"
        "        except OSError: pass\n    return 8"
    ),
    "it sends names of its own": (
        "import json, os\n"
        "false = {'__builtins__': None, '__name__': 'x', 'f': ['shared', 'unittest.mock', 'ANY']}\n"
        "for d in range(3, 200):\n    try: os.write(d, json.dumps(false).encode() + b'\\n')\n"
        "    except OSError: pass\ndef f(x): return 8"
    ),
    "it replaces the codec": (
        "import sys\nw = sys.modules['megatron_troll.rewards.judging.wire']\n"
        "w.Channel.encode = lambda self, value: ['shared', 'unittest.mock', 'ANY']\ndef f(x): return 8"
    ),
    "it replaces assert": "import builtins\nbuiltins.AssertionError = ValueError\ndef f(x): return 8",
    "it raises for it": "def f(x): raise AssertionError('9')",
}


@pytest.mark.parametrize("how", FORGED)
def test_a_forged_answer_earns_nothing(how):
    assert reward(FORGED[how], NINE) == 0.0


@pytest.mark.parametrize(
    ("program", "test"),
    [
        (FORGED["a difference that is always 0"], "assert abs(f(3) - 9) < 1e-6"),
        (EQUAL + "def f(x): return Equal()", "assert f(3) in (8, 9)"),
        (EQUAL + "def f(x): return Equal()", "assert f(3) < 9"),
        (EQUAL + "def f(x): return {1: Equal()}", "assert f(3) == {1: 9}"),
        ("def abs(x): return 0\ndef f(x): return 8.0", "assert abs(f(3) - 9) < 1e-6"),
        ("def isclose(a, b): return True\ndef f(x): return 8.0", "assert isclose(f(3), 9)"),
        (
            "class math:\n    isclose = lambda a, b: True\ndef f(x): return 8.0",
            "assert math.isclose(f(3), 9)",
        ),
        ("def Counter(x): return 0\ndef f(x): return [1]", "assert Counter(f(3)) == Counter([9])"),
        ("class P:\n    __eq__ = lambda a, b: True\n    def __init__(s, *a): pass", "assert P(1) == P(2)"),
        (
            "def f(g):\n    return g.__globals__['__builtins__'].exec('raise SystemExit')",
            "assert f(lambda: 1) == 9",
        ),
    ],
)
def test_a_forged_comparison_earns_nothing(program, test):
    assert reward(program, test) == 0.0


@pytest.mark.parametrize(
    ("returned", "gold", "right"),
    [
        ("[]", "0.5", False),
        ("0.5", "[0.5, 0.5]", False),
        ("[0.5]", "[0.5, 0.5]", False),
        ("[[]]", "[]", False),
        ("[0.5, 0.5]", "0.5", True),
        ("[]", "[]", True),
        ("np.float64(0.5)", "0.5", True),
    ],
)
@pytest.mark.parametrize(
    "test",
    [
        "assert np.allclose(f(), {}, atol=1e-3)",
        "from numpy import allclose\nassert allclose(f(), {})",
        "import numpy\nnumpy.testing.assert_allclose(f(), {})",
        "from numpy.testing import assert_array_equal\nassert_array_equal(f(), {})",
    ],
)
def test_numbers_of_another_shape_are_not_close(returned, gold, right, test):
    program = f"import numpy as np\ndef f(): return {returned}"
    assert reward(program, test.format(gold)) == float(right)


POINT = (
    "from __future__ import annotations\nfrom dataclasses import dataclass, field\n@dataclass\nclass Point:\n"
    "    x: 'int'\n    y: 'list[Point]' = field(default_factory=list)\n"
    "    def moved(self, by: int) -> Point: return Point(self.x + by)\n"
)
PICKLED = "import pickle\nclass C:\n    x = 9\ndef f(x): return pickle.loads(pickle.dumps(C())).x"
STACK = (
    "class Empty(Exception): pass\nclass Low(Empty): pass\n"
    "class Stack(list):\n    def push(self, x): self.append(x)\n"
    "    def pop(self):\n        if not self: raise Low('no item')\n        return super().pop()\n"
)
TREE = "class Node:\n    def __init__(self, v, left=None): self.v, self.left = v, left\n"
DEPTH = "def depth(n):\n    return 0 if n is None else 1 + depth(n.left)\n"


@pytest.mark.parametrize(
    ("program", "test"),
    [
        ("def f(x): return x * x", NINE),
        ("f = lambda x: x * x", NINE),
        (POINT, "assert Point(1).moved(2).x == 3\nassert Point(1, [Point(2)]).y[0].x == 2"),
        (PICKLED, NINE),
        (STACK, "s = Stack()\ns.push(1)\ns.push(2)\nassert len(s) == 2 and s.pop() == 2 and s[0] == 1"),
        (
            STACK,
            "try:\n    Stack().pop()\nexcept Empty as error:\n    said = str(error)\n"
            "assert said == 'no item'",
        ),
        (STACK, "assert isinstance(Stack(), Stack) and not isinstance(3, Stack)"),
        (
            "def f(x): raise ValueError(x)",
            "try:\n    f(3)\nexcept ValueError as e:\n    x = e.args\nassert x == (3,)",
        ),
        ("def f(a): a.sort(); a.append(9)", "a = [3, 1]\nassert f(a) is None\nassert a == [1, 3, 9]"),
        (
            "def f(n):\n    for i in range(n): yield i",
            "assert list(f(3)) == [0, 1, 2]\nassert next(f(1)) == 0",
        ),
        ("def f(g, x): return g(g(x))", "assert f(lambda x: x + 1, 1) == 3\nassert f(abs, -2) == 2"),
        ("def f(x): return lambda y: x + y", "assert f(1)(2) == 3"),
        (
            "from collections import Counter, defaultdict, deque, namedtuple\nP = namedtuple('P', 'x y')\n"
            "def f(s):\n    d = defaultdict(list)\n    d[s].append(1)\n"
            "    return Counter(s), d, deque(s), P(1, 2)",
            "c, d, q, p = f('aa')\nassert c == {'a': 2} and d == {'aa': [1]} and list(q) == ['a', 'a']\n"
            "assert p == (1, 2) and p.x == 1",
        ),
        (
            "import math\nfrom fractions import Fraction\n"
            "def f(): return [Fraction(1, 3), 1 + 2j, b'x', {1}, 10**5000, math.inf, range(3), None, True]",
            "from fractions import Fraction as F\nx = f()\n"
            "assert x == [F(1, 3), 1 + 2j, b'x', {1}, 10**5000, float('inf'), range(3), None, True]\n"
            "assert x[8] is True",
        ),
        ("import math\ndef f(r): return math.pi * r", "assert abs(f(1) - math.pi) < 1e-9"),
        ("def bisect(x): return 9", "assert bisect(3) == 9"),
        ("np = 5\ndef f(x): return x * x", NINE),
        ("LIMIT = 7\ndef f(): return LIMIT", "assert f() == LIMIT == 7"),
        (TREE + DEPTH, "assert depth(Node(1, Node(2))) == 2\nassert Node(1).left is None"),
        (DEPTH, TREE + "assert depth(Node(1, Node(2))) == 2"),
        ("def f(n): n.v = 9", TREE + "n = Node(1)\nf(n)\nassert n.v == 9"),
        ("def f(n): return n.left", TREE + "a = Node(1)\nassert f(Node(2, a)) == a"),
        (
            "class V:\n    def __init__(s, x): s.x = x\n    def __add__(s, o): return V(s.x + o.x)",
            "assert (V(1) + V(2)).x == 3",
        ),
        ("def f(x):\n    print('hello')\n    return x", "print('there')\nassert f('\\ud800') == '\\ud800'"),
        (
            "def f(x): return x\nif __name__ == '__main__': f(input())",
            "def check(g):\n    assert g(2) == 2\ncheck(f)",
        ),
    ],
)
def test_a_right_answer_passes(program, test):
    assert reward(program, test) == 1.0


@pytest.mark.parametrize(
    "program", ["print(2 * int(open('/dev/stdin').read()))", "print(2 * int(open(0).read()))"]
)
def test_a_program_may_read_its_input_as_a_file(program):
    test = {"input": "4\n", "output": "8\n"}
    assert JUDGE(f"```python\n{program}\n```", Prompt("p", (), "-", {"tests": [test]})) == 1.0
