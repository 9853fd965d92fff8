"""1 if the answer is mathematically equal to the gold one (Hugging Face's math-verify on SymPy)."""

import logging
import math
import re
from typing import Any

import sympy
from latex2sympy2_extended.logic import And
from math_verify import parse, verify
from pydantic import Field

from megatron_troll.config import Positive
from megatron_troll.data.boxed import last_boxed
from megatron_troll.rewards import notation
from megatron_troll.rewards.answers import stated
from megatron_troll.rewards.notation import Notation
from megatron_troll.rewards.reward import Reward
from megatron_troll.types import Prompt

# The library's own limits use alarm signals, which work only in the main thread; the pool limits the time.
NO_LIMIT = 0
# Errors that SymPy raises if it cannot evaluate or print an expression.
GIVES_UP = (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError)
# Digits that math-verify compares of numbers that are not decimals.
DIGITS = 15
# Gold answers that need no parse to be known as mathematics: sums, lists and pairs of simple terms. A parse
# takes milliseconds, and a file may hold 100,000.
SHORT = 200
NUMBER = r"\d+(?:\.\d+)?"
SIGN = r"\\pi|\\sqrt\{\d+\}|\\d?frac\{-?\d+\}\{\d+\}|[a-z](?:\^\{\d+\}|\^\d)?"
TERM = rf"-?(?:{NUMBER}|(?:\d+)?(?:{SIGN}))"
TERMS = rf"{TERM}(?: ?[-+=,] ?{TERM})*"
PLAIN = re.compile(rf"{TERMS}|[(\[]{TERMS}[)\]]")


class MathVerify(Reward):
    packages = ("math-verify", "latex2sympy2-extended", "sympy")

    boxed: bool = Field(default=False, description=r"only an answer in \boxed{} counts")
    decimals: Positive = Field(
        default=6, description="decimals to which numbers are compared, significant digits for those below 1"
    )

    def model_post_init(self, context: object) -> None:
        # Otherwise it warns of each answer that it cannot parse, and of the missing limits.
        logging.getLogger("math_verify").setLevel(logging.ERROR)

    def check(self, prompt: Prompt) -> None:
        if len(prompt.answer) < SHORT and PLAIN.fullmatch(prompt.answer):
            return
        gold = self._gold(prompt.answer)
        if not gold.is_text:
            _parsed_gold(gold, prompt.answer)

    def __call__(self, text: str, prompt: Prompt) -> float:
        gold = self._gold(prompt.answer)
        answer = self._answer(text)
        if isinstance(answer, Notation):
            return float(self._same(gold, answer))
        return float(answer is not None and self._equal(_parsed_gold(gold), _parse(answer)))

    def vote(self, text: str) -> str | None:
        """The first parse of the answer, as SymPy prints it: for x = 3 only the 3, numbers rounded to
        `decimals`. x(x + 1) and x^2 + x are both correct, but have different votes. The vote of an answer
        that is a text, or that SymPy cannot evaluate or print (a number of 5,000 digits), is its text."""
        answer = self._answer(text)
        if answer is None:
            return None
        if not isinstance(answer, Notation):
            return self._value(_parse(answer), answer.strip())
        if answer.choice or answer.is_text:
            return answer.choice or answer.words
        return _decimal(answer) if answer.base else self._value(_parse_stated(answer), answer.latex)

    def _value(self, found: list[Any], written: str) -> str | None:
        if not found:
            return None
        try:
            return _normal(found[0], self.decimals + _leading_zeros(found[:1]))
        except GIVES_UP:
            return written

    def _gold(self, answer: str) -> Notation:
        boxed = last_boxed(answer)
        if boxed is None:
            return notation.read("" if r"\boxed{" in answer else answer)
        return notation.read(boxed)

    def _answer(self, text: str) -> Notation | str | None:
        """The answer that `text` states; the whole text if it states none, or states it in a sentence."""
        if self.boxed:
            boxed = last_boxed(text)
            return None if boxed is None else notation.read(boxed)
        found = stated(text)
        if found is None:
            return notation.signs(text)
        return (
            notation.signs(found.text)
            if found.by == "line" and _is_prose(found.text) and not notation.changed_by_words(found.text)
            else notation.read(found.text)
        )

    def _same(self, gold: Notation, answer: Notation) -> bool:
        if gold.choice:
            return answer.chosen == gold.choice
        if gold.is_text:
            return answer.words == gold.words
        gold, answer = gold.beside(answer), answer.beside(gold)
        if gold.unit and answer.unit and gold.unit != answer.unit:
            return False
        if gold.base or answer.base:
            return _same_digits(gold, answer)
        if gold.unequal != answer.unequal or (gold.bracket + answer.bracket) in ("({", "{("):
            return False
        golds, answers = _parsed_gold(gold), _parse_stated(answer)
        if answer.inequality and isinstance(golds[0], sympy.Expr):
            return False
        return self._equal(golds, answers) and self._consistent(answers)

    def _equal(self, golds: list[Any], answers: list[Any]) -> bool:
        """Whether math-verify finds one of `answers` equal to one of `golds`. Numbers below 1 are compared to
        as many significant digits as others to decimals."""
        extra = _leading_zeros([*golds[:1], *answers[:1]])
        return verify(
            golds,
            answers,
            float_rounding=self.decimals + extra,
            numeric_precision=DIGITS + extra,
            allow_set_relation_comp=True,
            timeout_seconds=NO_LIMIT,
        )

    def _consistent(self, answers: list[Any]) -> bool:
        """Whether the numbers of an equation are equal: math-verify takes the last of 1 = 2 = 34."""
        numbers = [side for side in _sides(answers[0]) if _is_number(side)] if answers else []
        return all(self._equal([numbers[0]], [other]) for other in numbers[1:])


def _parse_stated(answer: Notation) -> list[Any]:
    """Possible parses, the likeliest first; [] if there is none. The library swallows errors inside SymPy:
    such an answer has no parse."""
    return _parse(rf"\boxed{{{answer.latex}}}")


def _parsed_gold(gold: Notation, written: str | None = None) -> list[Any]:
    """Parses of a gold answer, which must have one. Raises ValueError."""
    found = _parse_stated(gold)
    if not found:
        raise ValueError(f"the answer {written or gold.latex!r:.80} is not mathematics")
    return found


def _parse(text: str) -> list[Any]:
    return [] if notation.too_deep(text) else parse(text, parsing_timeout=NO_LIMIT)


def _is_prose(line: str) -> bool:
    """Whether an `Answer:` line is a sentence, with a formula in it or of many words."""
    outside = re.sub(r"\$[^$]*\$|\\\(.*?\\\)|\\[a-z]+\s*(?:\{[^{}]*\})?", " ", line)
    words = re.findall(r"[A-Za-z]{2,}", outside)
    formula = re.search(r"\$[^$]+\$|\\\(", line) is not None
    return len(words) > (1 if formula else 3)


def _same_digits(gold: Notation, answer: Notation) -> bool:
    """Whether two numbers are equal of which one or both state a base. An answer without one is in that of
    the gold; where the gold has none, the answer's value counts."""
    if gold.base is None:
        return _decimal(answer) == gold.latex
    return answer.base in (None, gold.base) and answer.latex.lstrip("0") == gold.latex.lstrip("0")


def _decimal(number: Notation) -> str:
    return str(int(number.latex, number.base or 10))


def _sides(value: Any) -> list[Any]:
    if isinstance(value, And):
        return [side for part in value.args for side in _sides(part)]
    return [value.lhs, value.rhs] if isinstance(value, sympy.Eq) else []


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, sympy.Expr)
        and not value.free_symbols
        and not value.atoms(sympy.core.function.AppliedUndef)
    )


def _leading_zeros(values: list[Any]) -> int:
    """Zeros after the point before the first digit of the smallest number in `values` that is not 0."""
    sizes = [_size(number) for value in values for number in _numbers(value)]
    return max([0, *(-math.ceil(size) for size in sizes if size is not None)])


def _numbers(value: Any) -> list[Any]:
    """The numbers that `value` is made of: itself, the members of a set, the decimals of an expression."""
    if _is_number(value):
        return [value]
    if isinstance(value, sympy.FiniteSet | sympy.Tuple | sympy.Interval | sympy.MatrixBase):
        members = value.flat() if isinstance(value, sympy.MatrixBase) else value.args
        return [number for member in members for number in _numbers(member)]
    return sorted(value.atoms(sympy.Float)) if isinstance(value, sympy.Basic) else []


def _size(number: Any) -> float | None:
    """log10 of the absolute value; None for 0 and for what has no value."""
    try:
        size = sympy.log(abs(sympy.N(number, 5)), 10).evalf(5)
        return float(size) if size.is_finite else None
    except GIVES_UP:
        return None


def _normal(value: Any, decimals: int) -> str:
    if isinstance(value, sympy.Eq) and isinstance(value.lhs, sympy.Symbol):
        value = value.rhs
    value = value.doit() if isinstance(value, sympy.Expr) else value
    if isinstance(value, sympy.Expr) and value.is_number and value.is_real:
        value = sympy.Rational(str(value.round(decimals)))
    return str(value)
