"""What servers draw after a sync, on every way that weights have, is what the trainer would: the log-probs
of the tokens, and the whole law of each position."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.dist.harness import RankPool
from tests.sglang.farm import RealServer
from tests.sglang.worker import TOLERANCE, Drawn, Job, assert_the_trainers, draw_twice

TP, PP = {"tp": 2, "ep": 2}, {"pp": 2}
CASES: dict[str, tuple[dict[str, int], dict[str, Any], dict[str, Any]]] = {
    "disk": (TP, {"via": "disk"}, {}),
    "tensor": (TP, {"via": "tensor"}, {"temperature": 0.7}),
    "distributed": (TP, {"via": "distributed"}, {"top_p": 0.9}),
    "tensor in many buckets from two stages": (PP, {"via": "tensor", "bucket_mib": 1}, {"top_k": 5}),
}


@pytest.mark.parametrize("name", CASES)
def test_two_servers_draw_what_the_trainer_would(
    name: str, ranks2: RankPool, two: list[RealServer], trained: Path, tmp_path: Path
) -> None:
    sizes, sync, sampling = CASES[name]
    sglang = {"servers": tuple(server.url for server in two), "sync": sync, "probe": {"max_kl": 1e-6}}
    job = Job(sizes, trained, tmp_path, sglang, sampling | {"max_tokens": 12})
    ranks = ranks2.run(draw_twice, job)
    for number in (0, 1):
        versions = [rank[number] for rank in ranks]
        rollouts = versions[0].rollouts
        assert [r.response_ids.tolist() for r in versions[1].rollouts] == [
            r.response_ids.tolist() for r in rollouts
        ]
        assert versions[0].synced["servers"] == 2
        assert versions[0].synced["engine_kl"] < 1e-6
        assert_the_trainers(versions, number + 1)
    assert_other_weights(ranks[0])


def assert_other_weights(versions: list[Drawn]) -> None:
    """Otherwise the second sync would not have been seen."""
    first, second = (drawn.rollouts[0].topk for drawn in versions)
    assert first is not None
    assert second is not None
    assert np.abs(first.logp[0] - second.logp[0]).max() > 100 * TOLERANCE
