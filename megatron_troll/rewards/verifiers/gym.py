"""The scorer of the reasoning-gym data set that a task is from (`gym` sources).

It judges the answer in the form that the prompt's last turn asks for: the last <answer>...</answer> if that
names <answer>, the last box if it names \\boxed, the later one of both, otherwise the whole text; without
white space around it. An answer that is not in the asked form earns 0.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field

from megatron_troll.data.boxed import last_boxed
from megatron_troll.data.gym.encoding import decode
from megatron_troll.data.gym.library import Library, judged, open_set
from megatron_troll.rewards.answers import last_tagged
from megatron_troll.rewards.reward import Reward
from megatron_troll.types import Prompt

FORMS: dict[str, Callable[[str], str | None]] = {
    "<answer>": lambda text: last_tagged(text, "answer"),
    r"\boxed": last_boxed,
}
FIELDS = ("gym", "question", "answer", "metadata")


class GymScorer(Reward):
    packages: ClassVar[tuple[str, ...]] = ("reasoning-gym",)

    credit: Literal["full", "partial"] = Field(
        default="full",
        description="full: 1 for full marks, 0 for all others; partial: the marks, which differ by set: some "
        "give .01 for no answer, or a share of 1 for a text that holds the answer",
    )

    def check(self, prompt: Prompt) -> None:
        if missing := [name for name in FIELDS if name not in prompt.record]:
            raise ValueError(f"the record has no {', '.join(missing)}: it is no task of a `gym` source")

    def __call__(self, text: str, prompt: Prompt) -> float:
        answer = stated(text, prompt.messages[-1].content)
        if answer is None:
            return 0.0
        made = prompt.record["gym"]
        entry = {name: decode(prompt.record[name]) for name in FIELDS[1:]}
        marks = judged(self._opened(made), made["set"], answer, entry)
        return marks if self.credit == "partial" else float(marks == 1)

    def vote(self, text: str) -> str | None:
        """The last <answer>...</answer>, otherwise the last box, otherwise the whole text."""
        found = (read(text) for read in FORMS.values())
        return next((one for one in found if one is not None), text).strip()

    def _opened(self, made: dict[str, Any]) -> Library:
        """The data set of a task, which holds the options that its scorer reads; opened once in a process."""
        key = repr(made)
        if key not in self._sets:
            self._sets[key] = open_set(made["set"], made["options"], level=made.get("level"))
        return self._sets[key]

    @cached_property
    def _sets(self) -> dict[str, Library]:
        return {}


def stated(text: str, asked: str) -> str | None:
    """The answer in the form that `asked`, the turn before it, names; None if it is not in that form."""
    named = max(FORMS, key=asked.rfind)
    found = FORMS[named](text) if named in asked else text
    return None if found is None else found.strip()
