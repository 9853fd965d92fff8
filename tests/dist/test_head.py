"""What the head reads of whole rows that it never forms at once."""

import pytest
import torch
from torch import Tensor

from megatron_troll.config.tree import Layout, Model
from megatron_troll.mcore.head import Head
from megatron_troll.mcore.model import build
from megatron_troll.mcore.shape import shape_of
from megatron_troll.types import Reads
from megatron_troll.weights.load import load
from megatron_troll.weights.source import RandomSource
from tests.dist.harness import RankPool
from tests.dist.tiny import DENSE, started


def collisions(tp: int) -> tuple[Tensor | None, Tensor]:
    """As read, and from whole rows, at a temperature that is not 1."""
    layout, shape = Layout(tp=tp), shape_of(DENSE)
    with started(layout) as groups:
        model = build(Model(path="", dtype="fp32", layout=layout), shape, groups)
        load(model, RandomSource(shape, seed=3))
        generator = torch.Generator().manual_seed(0)
        hidden = 40 * torch.randn(9, shape.hidden, generator=generator)
        target = torch.randint(0, shape.vocab, (9,), generator=generator)
        head = Head(model, temperature=0.7)
        rows = torch.cat(groups.tp.all_gather(head.log_probs(hidden)), -1)
        return head.read(hidden, target, Reads(logp=True, collision=True)).collision, rows.exp().square().sum(1)


@pytest.mark.parametrize("tp", [1, 2])
def test_the_collision_probability_is_that_of_whole_rows(tp: int, request: pytest.FixtureRequest) -> None:
    pool: RankPool = request.getfixturevalue(f"ranks{tp}")
    for read, rows in pool.run(collisions, tp):
        torch.testing.assert_close(read, rows, rtol=2e-5, atol=0)
        assert rows.max() > 2 * rows.min()
