import random

import numpy as np
import torch

from megatron_troll.mcore.checkpoint_tensors import captured_rng, restore_rng


def draw() -> tuple[float, ...]:
    # A second normal comes from the half that numpy keeps of the first.
    return random.random(), np.random.normal(), np.random.normal(), torch.randn(()).item(), random.gauss(0, 1)


def test_generators_continue_where_they_were() -> None:
    draw()
    np.random.normal()
    text = captured_rng()
    drawn = draw()
    assert draw() != drawn
    restore_rng(text)
    assert draw() == drawn
