"""The engine's top-K of the tokens of a micro-batch."""

import numpy as np
import pytest
import torch

from megatron_troll.batching.build import Form, build
from megatron_troll.types import NO_ID, TokenTopK
from tests.unit.batching.samples import VOCAB, rollout


def record(ids: list[list[int]], logp: list[list[float]]) -> TokenTopK:
    return TokenTopK(np.array(ids, np.int32), np.array(logp, np.float32))


INF = float("inf")
RESPONSE = rollout(
    [1, 2],
    [10, 20, 30, 40],
    mask=[1, 0, 1, 1],
    topk=record(
        [[11, 10, 12], [20, 21, 22], [31, NO_ID, NO_ID], [41, 42, 43]],
        [[-0.5, -1.0, -3.0], [-0.1, -3.0, -4.0], [-0.001, -INF, -INF], [-1.0, -2.0, -3.0]],
    ),
)


def test_the_sampled_token_is_appended_where_it_is_missing() -> None:
    topk = build([RESPONSE], [1.0], [1.0], [0], Form(VOCAB, topk=3)).rollout_topk
    assert topk is not None
    assert topk.ids.tolist() == [[11, 10, 12, NO_ID], [31, 30, NO_ID, NO_ID], [41, 42, 43, 40]]
    assert topk.count.tolist() == [3, 2, 4]
    assert topk.place.tolist() == [1, 1, 3]
    expected = [[-0.5, -1.0, -3.0, -INF], [-0.001, -0.3, -INF, -INF], [-1.0, -2.0, -3.0, -0.4]]
    torch.testing.assert_close(topk.logits, torch.tensor(expected))
    assert topk.lse is not None
    assert topk.lse.tolist() == [0.0] * 3
    assert topk.vocab == VOCAB


@pytest.mark.parametrize(("k", "ids"), [(1, [11, 10]), (5, [11, 10, 12, NO_ID, NO_ID, NO_ID])])
def test_fewer_or_more_entries_than_the_engine_gave(k: int, ids: list[int]) -> None:
    topk = build([RESPONSE], [1.0], [1.0], [0], Form(VOCAB, topk=k)).rollout_topk
    assert topk is not None
    assert topk.ids[0].tolist() == ids
    assert topk.ids[0, topk.place[0]] == 10


def test_no_record_where_a_rollout_has_none_or_none_is_asked_for() -> None:
    rollouts = [RESPONSE, rollout([1], [2])]
    assert build(rollouts, [1.0] * 2, [1.0] * 2, [0, 1], Form(VOCAB, topk=3)).rollout_topk is None
    assert build(rollouts, [1.0] * 2, [1.0] * 2, [0], Form(VOCAB)).rollout_topk is None


def test_a_kept_entry_that_is_not_finite_names_the_sample() -> None:
    broken = rollout([1], [2], topk=record([[5, 6]], [[-1.0, float("nan")]]), sample=3)
    with pytest.raises(ValueError, match=r"sample p#3: .* response token 0 gives id 6 the log-prob nan"):
        build([broken], [1.0], [1.0], [0], Form(VOCAB, topk=2))
