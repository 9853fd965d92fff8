"""The pure parts of an update: which rollouts can be used, and one row from several updates."""

from dataclasses import replace

import numpy as np
import pytest

from megatron_troll.training.learner import combine, finite
from megatron_troll.types import NO_ID, Prompt, Rollout, TokenTopK


def rollout(logp: list[float], mask: list[float], topk_logp: list[list[float]] | None = None) -> Rollout:
    topk = None
    if topk_logp is not None:
        ids = np.arange(2 * len(logp), dtype=np.int32).reshape(-1, 2)
        topk = TokenTopK(ids, np.array(topk_logp, dtype=np.float32))
    return Rollout(
        prompt=Prompt("p", (), ""),
        group=0,
        sample=0,
        prompt_ids=np.array([1]),
        response_ids=np.arange(len(logp)),
        marks=np.array(mask),
        logp=np.array(logp, dtype=np.float32),
        key=0,
        topk=topk,
        text="",
        finish="stop",
        temperature=1.0,
    )


@pytest.mark.parametrize("lost", [float("nan"), float("-inf"), float("inf")])
def test_a_log_prob_must_be_finite_where_it_carries_loss(lost: float) -> None:
    assert not finite(rollout([-1.0, lost], [1, 1]), topk=0)
    assert finite(rollout([-1.0, lost], [1, 0]), topk=0)


def test_the_engines_record_counts_only_as_far_as_it_is_read() -> None:
    broken = rollout([-1.0], [1], [[-1.0, float("nan")]])
    assert finite(broken, topk=0)
    assert finite(broken, topk=1)
    assert not finite(broken, topk=2)


def test_padding_of_the_record_may_be_infinite() -> None:
    padded = rollout([-1.0], [1], [[-1.0, float("-inf")]])
    assert padded.topk is not None
    ids = np.array([[4, NO_ID]], dtype=np.int32)
    assert finite(replace(padded, topk=TokenTopK(ids, padded.topk.logp)), topk=2)


def test_rows_of_updates_become_one() -> None:
    rows = [{"gap/max": 1.0}, {"loss": 1.0, "tau/min": 0.5, "gap/max": 3.0}, {"loss": 3.0, "tau/min": 0.25}]
    assert combine(rows) == {"gap/max": 3.0, "loss": 2.0, "tau/min": 0.25}
