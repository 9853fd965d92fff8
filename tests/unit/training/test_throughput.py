"""The work of a token, counted by hand."""

import pytest

from megatron_troll.config import Config
from megatron_troll.mcore.shape import shape_of
from megatron_troll.training.throughput import cost_of, repeated_tokens, speed
from tests.dist.tiny import DENSE, MOE, NEXT
from tests.unit.batching.samples import rollout

HIDDEN, VOCAB = 48, 131
ATTENTION = HIDDEN * 16 * (8 + 4 + 4 + 8)
EXPERTS = 2 * 3 * HIDDEN * 24 + 8 * HIDDEN


def test_dense_and_expert_layers() -> None:
    dense, tied, moe = (cost_of(shape_of(c)) for c in (DENSE, DENSE | {"tie_word_embeddings": True}, MOE))
    assert dense.parameters == 4 * (ATTENTION + 3 * HIDDEN * 80) + HIDDEN * VOCAB
    assert tied == dense
    assert moe.parameters == 4 * (ATTENTION + EXPERTS) + HIDDEN * VOCAB
    assert dense.attention == moe.attention == 4 * 8 * 16


def test_a_hybrid_has_gates_a_shared_expert_and_states() -> None:
    cost = cost_of(shape_of(NEXT))
    gated = ATTENTION + HIDDEN * 16 * 8
    key, value = 4 * 10, 8 * 14
    linear = HIDDEN * (2 * key + 2 * value + 2 * 8) + 4 * (2 * key + value) + value * HIDDEN
    states = 3 * 8 * 10 * 14
    mlp = EXPERTS + 3 * HIDDEN * 56 + HIDDEN
    assert cost.parameters == 2 * (gated + linear + states) + 4 * mlp + HIDDEN * VOCAB
    assert cost.attention == 2 * 8 * 16


@pytest.mark.parametrize(("old", "forwards"), [("trainer", 1.75), ("engine", 1.0)])
def test_the_forward_of_the_old_policy_counts_where_the_trainer_does_it(old: str, forwards: float) -> None:
    """A step of one second on 2 devices of 1 TFLOP/s each. Training is three forwards; the first of 4 updates
    reads the old policy with its own; a token of a sequence of 5 sees 2.5 others on average."""
    described = {"name": "x", "models": {"policy": {"path": "x", "dtype": "bf16"}}}
    config = Config.model_validate(described | {"objective": {"old": old}, "observe": {"peak_tflops": 1.0}})
    shape = shape_of(DENSE)
    cost = cost_of(shape)
    figures = speed(config, shape, [rollout([1, 2, 3], [4, 5])], seconds=1.0, devices=2)
    of_a_forward = 5 * (2 * cost.parameters + 4 * cost.attention * 2.5)
    assert figures["tokens_per_s"] == 5
    assert figures["mfu"] == pytest.approx((forwards + 3) * of_a_forward / 2e12)


def test_prompts_that_were_not_read_again_do_not_count() -> None:
    group = [rollout([1, 2, 3], [4, 5]), rollout([1, 2, 3], [6, 7])]
    assert repeated_tokens(group) == 3
    described = {"name": "x", "models": {"policy": {"path": "x", "dtype": "bf16"}}}
    config = Config.model_validate(
        described | {"objective": {"old": "engine"}, "observe": {"peak_tflops": 1.0}}
    )
    apart, shared = (speed(config, shape_of(DENSE), group, 1.0, 1, spared)["mfu"] for spared in (0.0, 1.0))
    assert shared / apart == pytest.approx((10 + 3 * 7) / (10 + 3 * 10))
