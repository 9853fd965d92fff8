"""Which prompts are held out."""

import hashlib
from collections.abc import Sequence

from megatron_troll.data.errors import DataError
from megatron_troll.data.messages import content_key
from megatron_troll.types import Prompt


def split(prompts: Sequence[Prompt], count: int, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held-out) prompts, each in the given order; the `count` smallest hashes of (seed, text) are
    held out, whatever that order is. Raises DataError where nothing would be left to train on."""
    if count >= len(prompts):
        raise DataError(f"data.held_out={count} leaves nothing to train on: there are {len(prompts)} prompts")
    ranks = sorted(range(len(prompts)), key=lambda index: _draw(prompts[index], seed))
    held = set(ranks[:count])
    return (
        [prompt for index, prompt in enumerate(prompts) if index not in held],
        [prompt for index, prompt in enumerate(prompts) if index in held],
    )


def check_disjoint(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Raises DataError naming a prompt that stands in both, by its text or by its id."""
    texts = {content_key(prompt.messages): prompt.id for prompt in train}
    ids = {prompt.id for prompt in train}
    for prompt in held_out:
        twin = texts.get(content_key(prompt.messages), prompt.id if prompt.id in ids else None)
        if twin is not None:
            raise DataError(
                f"held-out prompt {prompt.id!r} is also the training prompt {twin!r}: "
                f"{prompt.messages[-1].content!r:.80}"
            )


def _draw(prompt: Prompt, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}:{content_key(prompt.messages)}".encode(), digest_size=16).digest()
