"""Rows of LiveCodeBench (code_generation and code_generation_lite): the task as a prompt, and its tests as
the reward `code` reads them.

Tests are JSON texts; the lite version packs the private ones as base64 of zlib of a pickle of the JSON text
(lcb_runner/benchmarks/code_generation.py). The input of a function has one argument a line, in JSON.
"""

import base64
import json
import zlib
from pickletools import genops
from typing import Any, NoReturn

from megatron_troll.data.columns import Record, needed, text_of, without
from megatron_troll.data.rows import Malformed

QUESTION, PUBLIC, PRIVATE, METADATA = (
    "question_content",
    "public_test_cases",
    "private_test_cases",
    "metadata",
)
# Steps of a pickle: those that are a text, and those that stand around one.
TEXTS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
AROUND = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
PUBLISHED = (QUESTION, PUBLIC)
MOST_BYTES = 2**30  # of the unpacked tests of one row
OF_FUNCTION = "Complete this code, with the imports that it needs:\n\n```python\n{starter}\n```"
OF_PROGRAM = "The program reads its input from stdin and writes its output to stdout."
# An answer may give a tuple where the test has a list.
CHECK = """got = Solution().{function}({arguments})
assert (list(got) if isinstance(got, tuple) else got) == {output}"""


def prepared(record: Record) -> Record:
    """A row with its whole question and `tests`, public ones first: {"input": ..., "output": ...} for stdin
    and stdout, or assert lines for a function. Raises Malformed."""
    cases = [*_cases(record, PUBLIC), *(_cases(record, PRIVATE) if record.get(PRIVATE) else [])]
    starter = record.get("starter_code")
    if isinstance(starter, str) and starter.strip():
        asked = OF_FUNCTION.format(starter=starter.strip())
    else:
        asked = OF_PROGRAM
    question = text_of(needed(record, QUESTION), QUESTION)
    tests = [_test(case, record) for case in cases]
    return without(record, PUBLIC, PRIVATE) | {QUESTION: f"{question}\n\n{asked}", "tests": tests}


def _test(case: Any, record: Record) -> Any:
    if not isinstance(case, dict) or not all(isinstance(case.get(k), str) for k in ("input", "output")):
        raise Malformed(f"a test must have the texts 'input' and 'output', got {case!r:.80}")
    kind = case.get("testtype", "stdin")
    if kind == "stdin":
        return {"input": case["input"], "output": case["output"]}
    if kind != "functional":
        raise Malformed(f"a test has the testtype {kind!r:.40}, expected stdin or functional")
    arguments = [_literal(line) for line in case["input"].split("\n") if line.strip()]
    return CHECK.format(
        function=_function(record), arguments=", ".join(arguments), output=_literal(case["output"])
    )


def _function(record: Record) -> str:
    """The name of the function to test, from the row's metadata."""
    metadata = record.get(METADATA)
    metadata = _json(metadata, METADATA) if isinstance(metadata, str) else metadata
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise Malformed(f"{METADATA!r} must name the function to test as func_name, got {metadata!r:.80}")
    return name


def _literal(text: str) -> str:
    """A value in JSON as Python writes it."""
    return repr(_json(text, "a test"))


def _cases(record: Record, column: str) -> list[Any]:
    value = needed(record, column)
    if isinstance(value, str):
        value = _json(value if value.lstrip().startswith("[") else _unpacked(value, column), column)
    if not isinstance(value, list):
        raise Malformed(f"{column!r} must hold a list of tests, got {value!r:.80}")
    return value


def _unpacked(packed: str, column: str) -> str:
    """The JSON in base64 of zlib of a pickle of one text. The pickle is read, not run."""
    try:
        unpacking = zlib.decompressobj()
        pickled = unpacking.decompress(base64.b64decode(packed, validate=True), MOST_BYTES)
        steps = [(step.name, value) for step, value, _ in genops(pickled)]
    except (ValueError, zlib.error) as error:
        raise Malformed(f"{column!r} is neither JSON nor packed JSON: {error}") from error
    if not unpacking.eof:
        raise Malformed(f"{column!r} is cut, or unpacks to more than {MOST_BYTES:,} bytes")
    texts = [value for name, value in steps if name in TEXTS and isinstance(value, str)]
    if len(texts) != 1 or {name for name, _ in steps} - TEXTS - AROUND:
        raise Malformed(f"{column!r} is a pickle of more than a text")
    return texts[0]


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{what!r} is not JSON: {error}: {text!r:.80}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
