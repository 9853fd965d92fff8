r"""1 if the last match of a pattern is the answer. GSM8K: pattern `#### (-?[\d,]+)`, ignore `,`."""

import re

from pydantic import Field, field_validator

from megatron_troll.rewards.reward import Reward
from megatron_troll.types import Prompt


class Regex(Reward):
    pattern: str = Field(description="its first group is compared, or the whole match if it has none")
    ignore: str = Field(default="", description="characters left out of both sides")

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return pattern

    def check(self, prompt: Prompt) -> None:
        if not self._normal(prompt.answer):
            raise ValueError(f"nothing is left of the answer {prompt.answer!r:.80} without {self.ignore!r}")

    def __call__(self, text: str, prompt: Prompt) -> float:
        return float(self.vote(text) == self._normal(prompt.answer))

    def vote(self, text: str) -> str | None:
        matches = list(re.finditer(self.pattern, text))
        if not matches:
            return None
        last = matches[-1]
        found = last[1] if last.re.groups else last[0]
        return None if found is None else self._normal(found)

    def _normal(self, text: str) -> str:
        return text.translate(str.maketrans("", "", self.ignore)).strip()
