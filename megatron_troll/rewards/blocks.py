"""The program that a text gives as its answer, among its fenced blocks (docs/data.md has the table)."""

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OPENING = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*\{?\.?(?P<language>[\w+#.-]*)[^`\n]*$", re.MULTILINE
)
PYTHON = ("python", "py", "python3", "python2", "py3", "ipython")
DEFINES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
QUIET = (*DEFINES, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.AugAssign)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language in lower case ("": none is named), and its lines without indentation."""

    language: str
    code: str


def extract(text: str, runs: bool = False) -> str | None:
    """The program of an answer; None if it has none: the last block of Python (without any, the last that
    names no language) that is no mere example of use. `runs`: it must do something by itself, so where that
    block only defines functions, the blocks that use them are part of it."""
    found = list(blocks(text))
    python = [one.code for one in found if one.language in PYTHON]
    candidates = python or [one.code for one in found if not one.language]
    if not candidates:
        return None
    trees = [_tree(code) for code in candidates]
    chosen = max(i for i in range(len(trees)) if not _is_example(trees, i))
    examples = candidates[chosen + 1 :]
    if runs and examples and _is_quiet(trees[chosen]):
        return "\n".join([candidates[chosen], *examples])
    return candidates[chosen]


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a text; one that is not closed goes to its end."""
    place = 0
    while opening := OPENING.search(text, place):
        fence = opening["fence"]
        start = min(opening.end() + 1, len(text))
        closing = re.compile(rf"^[ \t]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$", re.MULTILINE)
        end = closing.search(text, start)
        inside = text[start : end.start() if end else len(text)]
        yield Block(opening["language"].lower(), textwrap.dedent(inside))
        if end is None:
            return
        place = end.end()


def _tree(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_example(trees: Sequence[ast.Module | None], index: int) -> bool:
    """Whether a block defines nothing and uses what an earlier block defines."""
    tree = trees[index]
    if tree is None or _defined(tree):
        return False
    earlier = set().union(*(_defined(one) for one in trees[:index] if one is not None))
    return any(isinstance(node, ast.Name) and node.id in earlier for node in ast.walk(tree))


def _defined(tree: ast.Module) -> set[str]:
    return {node.name for node in tree.body if isinstance(node, DEFINES)}


def _is_quiet(tree: ast.Module | None) -> bool:
    """Whether a module only defines and imports; a text on its own, like a docstring, does nothing."""
    return tree is not None and all(
        isinstance(node, QUIET) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in tree.body
    )
