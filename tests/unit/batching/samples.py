"""Rollouts made by hand."""

from collections.abc import Sequence

import numpy as np

from megatron_troll.types import Message, Prompt, Rollout, TokenTopK

VOCAB = 97


def rollout(
    prompt: Sequence[int],
    response: Sequence[int],
    mask: Sequence[int] | None = None,
    topk: TokenTopK | None = None,
    sample: int = 0,
) -> Rollout:
    """Log-probs are -0.01 times the token id, so that a misplaced one shows."""
    ids = np.array(response, dtype=np.int64)
    return Rollout(
        prompt=Prompt("p", (Message("user", "?"),), answer=""),
        group=0,
        sample=sample,
        prompt_ids=np.array(prompt, dtype=np.int32),
        response_ids=ids,
        marks=np.ones(len(ids), np.int32) if mask is None else np.array(mask, np.int32),
        logp=(-0.01 * ids).astype(np.float32),
        key=sample,
        topk=topk,
        text="",
        finish="stop",
        temperature=1.0,
    )


def random_rollouts(n: int, seed: int = 0) -> list[Rollout]:
    """Different lengths, some tokens masked out in the middle as tool output is."""
    rng = np.random.default_rng(seed)
    made = []
    for sample in range(n):
        prompt, response = rng.integers(1, 12), rng.integers(1, 20)
        made.append(
            rollout(
                rng.integers(1, VOCAB, prompt).tolist(),
                rng.integers(1, VOCAB, response).tolist(),
                rng.integers(0, 2, response).tolist(),
                sample=sample,
            )
        )
    return made
