"""The work of a token, counted by hand."""

from megatron_troll.mcore.shape import shape_of
from megatron_troll.training.throughput import cost_of
from tests.dist.tiny import DENSE, MOE, NEXT

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
