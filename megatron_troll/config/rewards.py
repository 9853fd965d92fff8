"""The configuration of a reward: a verifier, and the handling of its answers."""

from typing import Literal, Self

from pydantic import Field, model_validator

from megatron_troll.config.node import Node, Positive, PositiveFloat, Seconds, Slot


class SoftOverlong(Node):
    """A penalty added to the reward of long answers (DAPO): 0 up to `longest` - `cache` tokens, then a line
    to -1 at `longest`. Training only: no success and no evaluation has it."""

    cache: Positive = Field(description="tokens before `longest` over which the penalty grows")
    longest: Positive | None = Field(
        default=None, description="tokens at which it is -1; default: rollout.sampling.max_tokens"
    )
    weight: PositiveFloat = Field(default=1.0, description="factor of the penalty in the reward")


class Overlong(Node):
    """Handling of answers cut at max_tokens: kept as they are, left out of the loss, or given `reward`; and
    of those that come near it."""

    mode: Literal["keep", "mask", "penalise"] = Field(
        default="keep", description="a cut answer: as it is, out of the loss, or given `reward`"
    )
    reward: float = Field(default=0.0, description="what `penalise` gives in place of the verifier")
    soft: SoftOverlong | None = Field(default=None, description="default: no penalty on length")

    @model_validator(mode="after")
    def _one_penalty(self) -> Self:
        if self.soft is not None and self.mode == "penalise":
            raise ValueError(
                "soft and mode=penalise are two penalties for one answer: set mode to keep or mask"
            )
        return self


class RewardConfig(Slot):
    """A verifier by name or import path, its own fields beside it."""

    timeout_s: Seconds = Field(default=10.0, description="seconds for one answer; later, it earns 0")
    reasoning: Literal["drop", "keep"] = Field(
        default="drop",
        description="drop: the text after the last </think> is judged, unclosed reasoning earns 0; keep: the "
        "whole text is judged",
    )
    overlong: Overlong = Overlong()
