"""Several epochs over a batch: the old policy and the reference read every rollout once, and later epochs,
which deal the rollouts anew, are given the readings of the first."""

from collections import Counter

import pytest

from tests.dist.epochs_worker import EPOCHS, differences, forwards
from tests.dist.harness import RankPool
from tests.dist.layout_table import LAYOUTS
from tests.dist.methods_batch import Batch, make_methods_batch
from tests.dist.tiny import MOE, reference


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_methods_batch()


@pytest.fixture(scope="module")
def frozen(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("frozen")
    model = reference(MOE)
    model.load_state_dict(batch.frozen)
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("layout", ["dp2", "cp2", "tp2-ep2"])
def test_a_later_epoch_is_given_what_it_would_read(
    layout: str, batch: Batch, frozen: str, request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    ranks = request.getfixturevalue(f"ranks{world}").run(differences, sizes, batch, frozen)
    assert sum(rank.pop("rows") for rank in ranks) == sum(rank.pop("rows before") for rank in ranks) > 0
    for rank in ranks:
        assert {"/logp", "/topk/ids", "/topk/logits", "/frozen/hidden", "probe"} <= rank.keys()
        assert max(rank.values()) < 1e-4, rank


@pytest.mark.parametrize("sizes", [{}, {"pp": 2}], ids=["dp2", "pp2"])
def test_no_rollout_is_read_twice(sizes: dict[str, int], batch: Batch, frozen: str, ranks2: RankPool) -> None:
    """Without gradient; the first step's own forward reads its own."""
    results = ranks2.run(forwards, sizes, batch, frozen)
    replicas = results if not sizes else results[:1]
    old, trained, kept = (Counter[int](), Counter[int](), Counter[int]())
    for result in replicas:
        assert result.skipped == 0
        old.update(result.old)
        trained.update(result.trained)
        kept.update(result.reference)
    every = range(len(batch.rollouts))
    assert trained == dict.fromkeys(every, EPOCHS)
    assert kept == dict.fromkeys(every, 1)
    assert set(old.values()) == {1}
    assert 0 < len(old) < len(every)
