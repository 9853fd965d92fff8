"""How often each token occurs among those that carry loss, and samples that no micro-batch can hold."""

from dataclasses import replace

import numpy as np
import torch

from megatron_troll.training.microbatches import beyond_budget, frequencies
from tests.unit.batching.samples import rollout as short
from tests.unit.rollout.test_archive import rollout


def test_tokens_that_carry_no_loss_are_not_counted() -> None:
    ids, mask = np.array([3, 3, 1, 0]), np.array([1, 1, 1, 0])
    each = (replace(rollout("a", i, 4), response_ids=ids, marks=mask * keep) for i, keep in enumerate((1, 0)))
    batch = list(each)
    assert torch.equal(frequencies(batch, vocab=5), torch.tensor([0, 1 / 3, 0, 2 / 3, 0]))
    assert torch.equal(frequencies([], vocab=2), torch.zeros(2))


def test_samples_beyond_the_budget_are_counted_and_the_longest_is_named() -> None:
    batch = [short([1, 2], [3]), short([1, 2], [3, 4, 5], sample=1), short([1, 2], [3, 4], sample=2)]
    assert beyond_budget(batch, 5) is None
    said = beyond_budget(batch, 3)
    assert said is not None
    assert said.startswith("sample p#1 has 5 tokens with its prompt, more than train.token_budget=3: 2 of 3")
