r"""Notation of answers, brought into the forms that math-verify reads: docs/data.md says what is judged how.

Only the writing changes here: marks around an answer, thousands separators, Unicode signs, words between
values. What math-verify drops without a look (units, number bases, relations) is kept beside the text.
"""

import re
from dataclasses import dataclass, replace

from megatron_troll.rewards.quantities import SPACE, TEXT, read_base, read_unit, read_words

SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2011\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2007\u2009\u202f\u2002\u2003\u3000", " "),
        **dict.fromkeys("“”„«»", '"'),
        "\u00d7": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "÷": "/",
        "π": r"\pi ",
        "∞": r"\infty ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\neq ",
        "≈": r"\approx ",
        "\u222a": r"\cup ",
        "∩": r"\cap ",
        "∅": r"\emptyset ",
        "∈": r"\in ",
        "±": r"\pm ",
        "°": r"^\circ ",
        "²": "^2",
        "³": "^3",
        "\uff05": "%",
    }
)
ENDS = re.compile(rf"(?:{SPACE}|\\\\|\\$|(?<!\\right)\.|[,;:])+$")
STARTS = re.compile(rf"^(?:{SPACE}|\\\\|[:;])+")
PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("_", "_"))
MARKS = '*`"'
THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?P<gap>\\[,;:! ]|~| |\{,\}|,\\!)\d{3}(?:(?P=gap)\d{3})*(?![\d])")
COUNT = re.compile(
    r"(?<=\d)[ ~]*(?:\\text\s*\{\s*)?(hundred|thousand|million|billion|trillion)\b\s*\}?", re.IGNORECASE
)
COUNTS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# A number with words behind it, such as 100 dollars: math-verify knows a few of them only.
COUNTED = re.compile(
    r"(-?[\d.,]+) +(?!(?:or|and|not|to|times|plus|minus|percent|over)\b)[A-Za-z]{3,}(?: +[A-Za-z]+)*"
)
POWER = re.compile(r"(?<![\w.\\])(\d+\.?\d*|\.\d+)[eE]([+-]?\d+)(?![\w.])")
ROOT = re.compile(r"√\s*(\d+|\w|\([^()]*\))")
BETWEEN = re.compile(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?<=[\d}\s)\]])\b(?:and|or)\b(?=[\s\\({\[-])")
CURRENCY = re.compile(r"^(-?)\s*(?:\\?\$|[€£¥₹])\s*(?=[\d.\\])|(?<=\d)\s*[€£¥₹]$")
CHOICE = re.compile(r"\(?([A-J])\)?", re.IGNORECASE)
CHOSEN = re.compile(rf"\(?([A-J])(?:\)|[.:]|{SPACE}*$)(?!.*\b[A-J]\b)", re.IGNORECASE | re.DOTALL)
WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*")
INEQUALITY = re.compile(r"[<>]|\\(?:leq?|geq?|lt|gt|leqslant|geqslant)(?![a-z])")
UNEQUAL = re.compile(r"\\neq?(?![a-z])|\\not\b|!=")
DEEPEST, LONGEST = 40, 4000


@dataclass(frozen=True)
class Notation:
    """An answer with what math-verify does not compare. latex: what it parses; unit, base: None if the answer
    has none; words: the answer in lower case and without its article if it is only letters, or a number that
    its words change (7 remainder 3; latex is empty), otherwise None; is_text: it is meant as words, since it
    is written as text, has a word of four letters, or is such a number."""

    latex: str
    unit: str | None
    base: int | None
    words: str | None
    is_text: bool

    @property
    def inequality(self) -> bool:
        return INEQUALITY.search(self.latex) is not None

    @property
    def unequal(self) -> bool:
        return UNEQUAL.search(self.latex) is not None

    @property
    def choice(self) -> str | None:
        """The letter, if the whole answer is one, in brackets or not."""
        found = CHOICE.fullmatch(re.sub(TEXT, r"\1", self.latex).strip())
        return found[1].upper() if found else None

    @property
    def chosen(self) -> str | None:
        """The letter of an answer to a multiple-choice question; its text may follow, as in (E) 12."""
        found = CHOSEN.match(re.sub(TEXT, r"\1", self.latex))
        return self.choice or (found[1].upper() if found else None)

    def beside(self, other: "Notation") -> "Notation":
        """The answer with a letter behind its number as a unit, if `other` has a unit."""
        if other.unit is None or self.unit is not None:
            return self
        latex, unit = read_unit(self.latex, letter=True)
        return replace(self, latex=latex, unit=unit)

    @property
    def bracket(self) -> str:
        r"""The kind of brackets around the whole: "(" a tuple or an interval, "{" a set, "" neither."""
        if re.match(r"(?:\\left)?\\\{", self.latex):
            return "{"
        return "(" if re.fullmatch(r"(?:\\left)?[(\[].*(?:\\right)?[)\]]", self.latex, re.DOTALL) else ""


def read(answer: str) -> Notation:
    """The notation of a stated answer: the content of a box or a line, or a gold answer. It is empty for more
    than LONGEST characters, which no answer has."""
    if len(answer) > LONGEST:
        return Notation("", None, None, None, False)
    latex = bare(signs(answer))
    latex = (
        re.sub(r"\\(?:approx|sim)(?![a-z])", "", latex) if re.match(r"\\(?:approx|sim)\b", latex) else latex
    )
    latex = re.sub(r"^\w+\s*\\in(?![a-z])\s*", "", latex)
    latex = CURRENCY.sub(r"\1", latex)
    latex, changed = read_words(latex)
    if changed is not None:
        return Notation("", None, None, changed, True)
    latex, unit = read_unit(latex)
    latex = bare(BETWEEN.sub(", ", latex))
    if counted := COUNTED.fullmatch(latex):
        latex = counted[1]
    latex, base = read_base(latex)
    return Notation(latex, unit, base, *_words(latex))


def changed_by_words(line: str) -> bool:
    """Whether a line is a number with words that make another of it, such as 2 thirds of the cake."""
    latex = bare(signs(line))
    return read_words(latex) != (latex, None)


def signs(text: str) -> str:
    """`text` with Unicode signs as LaTeX, numbers without thousands separators, 1.5e3 as a power of ten."""
    text = ROOT.sub(lambda root: rf"\sqrt{{{root[1].strip('()')}}}", text).translate(SIGNS)
    text = (
        text.replace(r"\varnothing", r"\emptyset").replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    )
    text = re.sub(r"\^\s*\{?\s*(?:\\(?:text|mathrm)\s*\{o\}|\{o\})\s*\}?", r"^\\circ", text)
    text = THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    text = re.sub(r"(?<=\d)\{,\}(?=\d)", ",", text)
    text = COUNT.sub(lambda count: rf"\times 10^{{{COUNTS[count[1].lower()]}}}", text)
    return POWER.sub(r"\1\\times 10^{\2}", text)


def bare(answer: str) -> str:
    """`answer` without the marks around it: white space, a full stop, $, quotes, emphasis."""
    while True:
        stripped = STARTS.sub("", ENDS.sub("", answer)).strip(MARKS)
        for opening, closing in PAIRS:
            stripped = _without(stripped, opening, closing)
        if stripped == answer:
            return answer
        answer = stripped


def too_deep(latex: str) -> bool:
    """Whether brackets are nested deeper than any answer needs: math-verify would take minutes."""
    depth = 0
    for character in latex:
        depth += (character in "({[") - (character in ")}]")
        if depth > DEEPEST:
            return True
    return False


def _without(text: str, opening: str, closing: str) -> str:
    inside = text[len(opening) : -len(closing)]
    whole = len(text) > len(opening + closing) and text.startswith(opening) and text.endswith(closing)
    return inside if whole and opening not in inside and closing not in inside else text


def _words(latex: str) -> tuple[str | None, bool]:
    plain = bare(re.sub(TEXT, r"\1", latex)).strip()
    if not WORDS.fullmatch(plain):
        return None, False
    is_text = plain != latex or re.search(r"[A-Za-z]{4}", plain) is not None
    return re.sub(r"^(?:an?|the) ", "", re.sub(r"\s+", " ", plain.lower())), is_text
