"""Docstrings open with a verb or with the thing they name."""

import ast
from collections.abc import Iterator

import pytest

from tests.house.markdown import ROOT

FOLDERS = ("megatron_troll", "kernels/troll_kernels", "tools", "sglang_cpu")
# Openings that leave a reader to guess the subject. "Whether" is for what returns a bool.
DANGLING = (
    *(
        "of",
        "those",
        "none",
        "from",
        "where",
        "what",
        "which",
        "who",
        "how",
        "why",
        "is",
        "at",
        "by",
        "as",
        "for",
    ),
    *("on", "in", "to", "after", "before", "with", "also", "such", "that", "because", "if", "when", "under"),
    *("over", "until", "its", "their"),
)


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """(line, docstring) of a module, its classes and functions."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found = ast.get_docstring(node)
            if found:
                yield node.body[0].lineno, found


def dangling(text: str) -> list[tuple[int, str]]:
    """Line and opening of the docstrings of a file that begin with a dangling word."""
    return [(line, found[:60]) for line, found in docstrings(text) if found.split()[0].lower() in DANGLING]


def test_what_counts_as_dangling() -> None:
    text = '"""Of one chunk."""\ndef f():\n    """Return a chunk."""\nclass A:\n    """Whether it is."""\n'
    assert dangling(text) == [(1, "Of one chunk.")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_opens_with_a_dangling_word(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): dangling(file.read_text()) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
