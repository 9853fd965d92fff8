"""Units and number bases of an answer, which math-verify drops without a look."""

import re
from functools import lru_cache
from typing import Any

from sympy.physics import units

SPACE = r"(?:\\[ ,;:!]|\\quad|~|\s)"
TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname|rm)\s*\{([^{}]*)\}"
UNIT = re.compile(
    rf"([^A-Za-z]*?[\d}})])(?:{SPACE}|\\\\)*([A-Za-z](?:[A-Za-z0-9./^{{}}-]|{SPACE})*)", re.DOTALL
)
SHORT = {"sec": "second", "min": "minute", "hr": "hour", "hrs": "hour", "lb": "pound", "lbs": "pound"} | {
    "n": "newton",
    "j": "joule",
    "w": "watt",
}
LONGEST = 200  # an answer with a unit
BASE = re.compile(r"(-?[0-9A-Fa-f]*\d[0-9A-Fa-f]*)_\{?(?:\\text\s*\{)?(\d+|[a-z]+)\}{0,2}")
BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}


# What a word directly behind a number makes of it.
PARTS = ("half", "third", "quarter", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
FACTORS = {
    **{part: rf"\frac{{{{{{}}}}}}{{{{{number}}}}}" for number, part in enumerate(PARTS, 2)},
    "fourth": r"\frac{{{}}}{{4}}",
    "hundredth": r"\frac{{{}}}{{100}}",
    "thousandth": r"\frac{{{}}}{{1000}}",
    "dozen": r"{}\times 12",
    "squared": "{}^2",
    "cubed": "{}^3",
    "factorial": "{}!",
    "percent": r"{}\%",
}
COUNTED = re.compile(r"(-?[\d.,]*\d) +([A-Za-z]+)((?: +[\w.,'-]+)*)")
# Words behind a number that make another of it, which is not calculated here.
CHANGING = re.compile(r"\b(?:choose|remainder|below|less|fewer|more|mod|modulo|short)\b", re.IGNORECASE)


def read_words(latex: str) -> tuple[str, str | None]:
    """The answer with a word like `dozen` behind its number as LaTeX; and all of it, in lower case, if words
    behind the number make another of it (7 remainder 3)."""
    plain = re.sub(rf"{SPACE}+", " ", re.sub(TEXT, r" \1 ", latex[:LONGEST])).strip(" .")
    found = COUNTED.fullmatch(plain.replace(" per cent", " percent"))
    if found is None:
        return latex, None
    number, word, rest = found.groups()
    singular = {"halves": "half"}.get(word.lower(), word.lower().removesuffix("s"))
    if CHANGING.search(rest) or (singular not in FACTORS and CHANGING.search(word)):
        return latex, plain.lower()
    return (FACTORS[singular].format(number), None) if singular in FACTORS else (latex, None)


def read_unit(latex: str, letter: bool = False) -> tuple[str, str | None]:
    """The answer without its unit, and the unit in a normal form; a unit that is not known stays. A letter
    behind a number may be a variable, unless it is text: it is read as a unit only with `letter`."""
    plain = re.sub(TEXT, r" \1 ", latex[:LONGEST])
    found = UNIT.fullmatch(plain)
    if found is None or (plain == latex and len(found[2]) == 1 and not letter):
        return latex, None
    words = re.sub(rf"{SPACE}+", " ", found[2]).strip(" .").lower()
    half = re.sub(r"[. ]", "", words)
    unit = half if half in ("am", "pm") else _known(re.sub(r"\s*\^\s*", "^", re.sub(r"[{}]", "", words)))
    return (latex, None) if unit is None else (found[1], unit)


@lru_cache(maxsize=1024)
def _known(words: str) -> str | None:
    """A unit like km/h or square centimetres in SI base units, as text; None if a word of it is no unit."""
    product: Any = 1
    sign, square = 1, 1
    for name, power in re.findall(r"([a-z]+|/)\.?(?:\^?(-?\d))?", words.replace(" per ", "/")):
        if name in ("square", "sq", "cubic"):
            square = 3 if name == "cubic" else 2
        elif name == "/":
            sign = -1
        else:
            full = str(SHORT.get(name, name)).replace("metre", "meter").replace("litre", "liter")
            unit = getattr(units, full, None)
            if not isinstance(unit, units.Quantity):
                return None
            product *= unit ** (sign * square * int(power or 1))
            square = 1
    base = [units.meter, units.kilogram, units.second, units.ampere, units.kelvin, units.mole, units.candela]
    return None if product == 1 else str(units.convert_to(product, base))


def read_base(latex: str) -> tuple[str, int | None]:
    """The digits of a number with its base, as in 101_2; base None if the answer is no such number."""
    found = BASE.fullmatch(latex)
    if found is None:
        return latex, None
    base = BASES.get(found[2]) or (int(found[2]) if found[2].isdigit() else 0)
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in found[1].lstrip("-")):
        return latex, None
    return found[1], base
