"""What an optimizer refuses of the model it is given."""

import pytest

from megatron_troll.config import Layout, Model, Optimizer
from megatron_troll.mcore.model import build
from megatron_troll.mcore.optimizer import trainable
from megatron_troll.mcore.shape import shape_of
from tests.dist.harness import RankPool
from tests.dist.tiny import DENSE, started


@pytest.mark.parametrize(
    ("trained", "distributed", "complaint"),
    [
        (True, False, "built with optimizer.distributed: True, its optimizer has False"),
        (False, True, "built with trained=False"),
    ],
)
def test_a_model_built_for_another_optimizer_is_refused(
    ranks1: RankPool, trained: bool, distributed: bool, complaint: str
) -> None:
    ranks1.run(check_refused, trained, distributed, complaint)


def check_refused(trained: bool, distributed: bool, complaint: str) -> None:
    config = Model(path="none", dtype="fp32")
    with started(Layout()) as groups:
        model = build(config, shape_of(DENSE), groups, trained=trained)
        with pytest.raises(ValueError, match=complaint):
            trainable(model, Optimizer(distributed=distributed), total_steps=1)
