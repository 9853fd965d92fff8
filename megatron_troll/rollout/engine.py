"""What the loop asks of whoever generates: requests in, rollouts out."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_troll.config.tree import Sampling
from megatron_troll.data.chat import render_prompt
from megatron_troll.types import Prompt, Rollout


@dataclass(frozen=True)
class Request:
    """One sample to draw. prompt_ids int64 [P]; group: the prompt's index in its batch; sample: which of the
    samples that the batch has of the prompt."""

    prompt: Prompt
    group: int
    sample: int
    prompt_ids: np.ndarray


@runtime_checkable
class Engine(Protocol):
    """Draws one rollout per request under the newest weights. A response ends with one of `stop_ids`, which
    hold the tokens of `sampling.stop`, or after `sampling.max_tokens`; its text lacks the stop token.

    The same requests, `sampling` and `round` give the same tokens on any layout: a token's uniform is keyed
    by (seed, round, prompt id, sample, position). Every rank calls it with the same requests and receives
    every rollout, in the order of the requests. Blocks on all ranks.
    """

    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]: ...


def requests_for(
    prompts: Sequence[Prompt],
    samples: int,
    tokenizer: PreTrainedTokenizerBase,
    drawn: Counter[str] | None = None,
) -> list[Request]:
    """`samples` requests for each prompt, a prompt's samples next to each other. The samples of a prompt that
    comes again (where an epoch ends) are numbered on, so that it draws others; `drawn` has the samples that
    earlier calls of the same round asked for, by prompt id, and is counted on."""
    requests: list[Request] = []
    drawn = Counter() if drawn is None else drawn
    for group, prompt in enumerate(prompts):
        ids, first = render_prompt(prompt.messages, tokenizer), drawn[prompt.id]
        requests += [Request(prompt, group, first + sample, ids) for sample in range(samples)]
        drawn[prompt.id] += samples
    return requests
