"""Whether the assert lines of a record check anything; read before any answer is tried on them."""

import ast
from collections.abc import Iterable, Iterator

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def problem(test: str) -> str | None:
    """Return why every answer that loads passes `test`; None if it checks something. Raises SyntaxError."""
    tree = ast.parse(test)
    asserted = [node.test for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    if any(isinstance(what, ast.Tuple) and what.elts for what in asserted):
        return "an assert of a tuple is always true"
    statements = list(_run(tree.body))
    if any(_can_fail(statement) for statement in statements):
        return None
    if any(isinstance(one, ast.Expr) and _compares(one.value) for one in statements):
        return "it compares without assert"
    if any(_calls(statement) for statement in statements):
        return None
    defined = [one.name for one in tree.body if isinstance(one, ast.FunctionDef)]
    return f"it never calls {defined[-1]}" if defined else "it has no assert"


def _run(statements: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when the test is loaded: not those of functions and classes that it defines."""
    for statement in statements:
        if isinstance(statement, FUNCTIONS):
            continue
        yield statement
        for part in ast.iter_child_nodes(statement):
            if isinstance(part, ast.stmt):
                yield from _run([part])
            elif isinstance(part, ast.ExceptHandler | ast.match_case):
                yield from _run(part.body)


def _can_fail(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Assert):
        return not (isinstance(statement.test, ast.Constant) and statement.test.value)
    return isinstance(statement, ast.Raise)


def _compares(value: ast.expr) -> bool:
    """Whether an expression is only a comparison, whose value is lost."""
    if isinstance(value, ast.BoolOp):
        return all(_compares(one) for one in value.values)
    negated = isinstance(value, ast.UnaryOp) and isinstance(value.op, ast.Not)
    return negated or isinstance(value, ast.Compare)


def _calls(node: ast.AST) -> bool:
    """Whether a call is among the expressions of a statement, those of statements inside it left out."""
    if isinstance(node, ast.Call):
        return True
    parts = ast.iter_child_nodes(node)
    return any(_calls(part) for part in parts if not isinstance(part, ast.stmt | ast.Lambda))
