"""1 if the answer is mathematically equal to the gold one (Hugging Face's math-verify on SymPy)."""

import logging
from typing import Any

import sympy
from math_verify import parse, verify
from pydantic import Field

from megatron_troll.config import Positive
from megatron_troll.rewards.reward import Reward
from megatron_troll.types import Prompt

# The library's own limits use alarm signals, which work only in the main thread; the pool limits the time.
NO_LIMIT = 0
# Errors that SymPy raises if it cannot evaluate or print an expression.
GIVES_UP = (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError)


class MathVerify(Reward):
    boxed: bool = Field(default=False, description=r"only an answer in \boxed{} counts")
    decimals: Positive = Field(default=6, description="decimals to which numbers are compared")

    def model_post_init(self, context: object) -> None:
        # Otherwise it warns of each answer that it cannot parse, and of the missing limits.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def __call__(self, text: str, prompt: Prompt) -> float:
        gold = parse(_box(prompt.answer), parsing_timeout=NO_LIMIT)
        if not gold:
            raise ValueError(f"the answer {prompt.answer!r} of prompt {prompt.id!r} is not mathematics")
        right = verify(gold, self._parse(text), float_rounding=self.decimals, timeout_seconds=NO_LIMIT)
        return float(right)

    def vote(self, text: str) -> str | None:
        """The first parse of the answer, as SymPy prints it: for x = 3 only the 3, numbers rounded to
        `decimals`. x(x + 1) and x^2 + x are both correct, but have different votes. The vote of an answer
        that SymPy cannot evaluate or print (a number of 5,000 digits) is its text."""
        found = self._parse(text)
        if not found:
            return None
        try:
            return _normal(found[0], self.decimals)
        except GIVES_UP:
            return last_boxed(text) or text.strip()

    def _parse(self, text: str) -> list[Any]:
        """Possible parses of the answer, the likeliest first; [] if there is none. The library swallows
        errors inside SymPy: such an answer has no parse."""
        boxed = last_boxed(text)
        if self.boxed and boxed is None:
            return []
        return parse(text if boxed is None else _box(boxed), parsing_timeout=NO_LIMIT)


def _normal(value: Any, decimals: int) -> str:
    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        value = value.rhs
    value = value.doit() if isinstance(value, sympy.Expr) else value
    if isinstance(value, sympy.Expr) and value.is_number and value.is_real:
        value = sympy.Rational(str(value.round(decimals)))
    return str(value)


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} whose braces close; None if there is none."""
    before, mark, rest = text.rpartition(r"\boxed{")
    if not mark:
        return None
    depth = 1
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    return last_boxed(before)


def _box(answer: str) -> str:
    return answer if answer.startswith((r"\boxed{", "$")) else rf"\boxed{{{answer}}}"
