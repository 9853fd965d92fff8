"""Continuing a run although something that it was made with has changed."""

from typing import Literal

from pydantic import Field

from megatron_troll.config.node import Node

MadeWith = Literal[
    "data", "held_out", "tokenizer", "template", "stop_tokens", "reference", "rewards", "methods"
]


class Resume(Node):
    """Continue a run, as `resume: true` does, although something that it was made with has changed."""

    accept: tuple[MadeWith, ...] = Field(
        default=(),
        description="parts that may differ from what the checkpoint was made with: data (training prompts), "
        "held_out (held-out prompts), tokenizer (its files), template (of chats), stop_tokens, reference "
        "(its weights), rewards (your reward's code), methods (code of your methods and your engine)",
    )
