"""Groups of one, two, seven and sixteen samples, in which everything is that a shared prompt has to bear."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_troll.types import FinishReason, Rollout
from tests.dist.layouts_batch import KINDS, TEMPERATURE, Batch, make_batch
from tests.unit.batching.samples import rollout

# Tokens of the longest prompt, of the group of two.
LONGEST_PROMPT = 30
# A tool's answer of three tokens after a turn of two.
TURNS = [1, 1, 0, 0, 0, 1, 1, 1, 1]


def make_sharing_batch() -> Batch:
    """The weights of `make_batch`, under which nothing lies near a border, and rollouts of random tokens.

    Of the group of seven, three share a turn and two of them the tool's answer to it; one has no response,
    and one is masked whole, because it was cut at the length limit. Of the sixteen, every third was cut and
    stays in the loss.
    """
    whole = make_batch("moe")
    generator = np.random.default_rng(3)

    def ids(count: int) -> list[int]:
        return generator.integers(0, KINDS["moe"].config["vocab_size"], count).tolist()

    prompts, turn, answer = [ids(n) for n in (4, LONGEST_PROMPT, 9, 6)], ids(2), ids(3)
    episodes = [turn + answer + ids(4), turn + answer + ids(3), turn + ids(7)]
    seven = [ids(5), *episodes, [], ids(6), ids(1)]
    rollouts = [
        drawn(prompts[0], ids(7), group=0),
        *(drawn(prompts[1], ids(n), group=1) for n in (3, 8)),
        *(
            drawn(prompts[2], response, group=2, mask=mask)
            for response, mask in zip(seven, [None, *([TURNS] * 3), None, [0] * 6, None])
        ),
        *(
            drawn(prompts[3], ids(2 + n % 5), group=3, finish="stop" if n % 3 else "length")
            for n in range(16)
        ),
    ]
    advantages = generator.normal(size=len(rollouts)).tolist()
    return replace(whole, rollouts=rollouts, advantages=advantages, law=torch.empty(0))


def drawn(
    prompt: Sequence[int],
    response: Sequence[int],
    group: int,
    mask: Sequence[int] | None = None,
    finish: FinishReason = "stop",
) -> Rollout:
    mask = None if mask is None else mask[: len(response)]
    made = rollout(prompt, response, mask)
    return replace(made, group=group, temperature=TEMPERATURE, finish=finish)
