"""Which optimizer steps have a token that carries loss, judged alike on every rank."""

from dataclasses import replace

import numpy as np

from megatron_troll.batching.plan import PlannedStep
from megatron_troll.training.microbatches import carries_loss
from tests.unit.rollout.test_archive import rollout


def test_a_step_carries_loss_if_one_token_of_one_rank_does() -> None:
    whole = rollout("a", 0, 3)
    masked = whole.masked()
    one = replace(whole, marks=np.array([0, 0, 1]))
    batch = [masked, masked, one, masked]
    assert not carries_loss(batch, PlannedStep(0, (((0,),), ((1,),))))
    assert carries_loss(batch, PlannedStep(0, (((3,),), ((2,),))))
