"""The program of an answer among its fenced blocks."""

import pytest

from megatron_troll.rewards.blocks import extract

SQUARE = "def square(x):\n    return x * x\n"
USE = "print(square(3))\n"


@pytest.mark.parametrize(
    "language", ["python", "Python", "PYTHON", "py", "python3", "", " python", "{.python}"]
)
@pytest.mark.parametrize("fence", ["```", "````", "~~~"])
def test_fences(fence, language):
    assert extract(f"So:\n{fence}{language}\n{SQUARE}{fence}\nDone.") == SQUARE


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("```python\na = 1\n```", "a = 1\n"),
        ("```python title='x'\na = 1\n```", "a = 1\n"),
        ("```python\na\n```\nno:\n```python\nb\nc\n```", "b\nc\n"),
        ("```python\na\n```\n```\nnot this\n```", "a\n"),
        ("```python\na\n```\n```text\n9\n```", "a\n"),
        ("```\na\n```\n```bash\nls\n```", "a\n"),
        ("```bash\nls\n```", None),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("````python\n'''\n```\n'''\n````", "'''\n```\n'''\n"),
        ("~~~python\n'''\n```\n'''\n~~~", "'''\n```\n'''\n"),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("```python\nunclosed", "unclosed"),
        ("```python", ""),
        (f"```python\n{SQUARE}```\nUse it:\n```python\n{USE}```", SQUARE),
        (f"```python\n{SQUARE}```\nUse it:\n```\n{USE}```", SQUARE),
        (f"```python\n{SQUARE}```\nAll:\n```python\n{SQUARE}{USE}```", SQUARE + USE),
        ("```python\nsyntax error\n```\n```python\nprint(1)\n```", "print(1)\n"),
        ("print(1)", None),
        ("", None),
    ],
)
def test_the_block_that_is_the_answer(text, program):
    assert extract(text) == program


def test_a_program_that_must_run_has_its_example_where_it_only_defines():
    uses = "print(square(int(input())))\n"
    only_defines = f"```python\n{SQUARE}```\nThen:\n```python\n{uses}```"
    assert extract(only_defines, runs=True) == f"{SQUARE}\n{uses}"
    runs = f"```python\n{SQUARE}{uses}```\nFor example:\n```python\n{USE}```"
    assert extract(runs, runs=True) == SQUARE + uses
