"""1 if the whole text is the answer."""

from typing import ClassVar

from pydantic import Field

from megatron_troll.rewards.reward import Reward
from megatron_troll.types import Prompt


class ExactMatch(Reward):
    cheap: ClassVar[bool] = True
    strip: bool = Field(default=True, description="leave out white space around both")
    ignore_case: bool = Field(default=False, description="compare without case")

    def check(self, prompt: Prompt) -> None:
        if not self.vote(prompt.answer):
            raise ValueError(
                f"the answer {prompt.answer!r:.80} is blank: an empty text would earn the reward"
            )

    def __call__(self, text: str, prompt: Prompt) -> float:
        return float(self.vote(text) == self.vote(prompt.answer))

    def vote(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text
