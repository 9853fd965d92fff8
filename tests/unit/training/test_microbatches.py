"""How often each token occurs among those that carry loss."""

from dataclasses import replace

import numpy as np
import torch

from megatron_troll.training.microbatches import frequencies
from tests.unit.rollout.test_archive import rollout


def test_tokens_that_carry_no_loss_are_not_counted() -> None:
    ids, mask = np.array([3, 3, 1, 0]), np.array([1, 1, 1, 0], dtype=np.float32)
    batch = [replace(rollout("a", i, 4), response_ids=ids, mask=mask * keep) for i, keep in enumerate((1, 0))]
    assert torch.equal(frequencies(batch, vocab=5), torch.tensor([0, 1 / 3, 0, 2 / 3, 0]))
    assert torch.equal(frequencies([], vocab=2), torch.zeros(2))
