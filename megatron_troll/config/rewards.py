"""The configuration of a reward: a verifier, and the handling of its answers."""

from typing import Literal

from pydantic import Field

from megatron_troll.config.node import Node, Seconds, Slot


class Overlong(Node):
    """Handling of answers cut at max_tokens: kept as they are, left out of the loss, or given `reward`."""

    mode: Literal["keep", "mask", "penalise"] = Field(
        default="keep", description="a cut answer: as it is, out of the loss, or given `reward`"
    )
    reward: float = Field(default=0.0, description="what `penalise` gives in place of the verifier")


class RewardConfig(Slot):
    """A verifier by name or import path, its own fields beside it."""

    timeout_s: Seconds = Field(default=10.0, description="seconds for one answer; later, it earns 0")
    reasoning: Literal["drop", "keep"] = Field(
        default="drop",
        description="drop: the text after the last </think> is judged, unclosed reasoning earns 0; keep: the "
        "whole text is judged",
    )
    overlong: Overlong = Overlong()
