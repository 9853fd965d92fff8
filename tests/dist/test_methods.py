"""Every method gives the same loss, diagnostics and gradients on every layout, packed or padded, cut into
micro-batches that split prompt groups; and they are those of full rows of logits in float64 on one process.

methods_batch.py has the batch, methods_table.py the methods, methods_oracle.py the full rows,
methods_worker.py what ranks run.
"""

from dataclasses import replace

import pytest
import torch

from megatron_troll.objectives import compose
from megatron_troll.observe.fields import EXPERTS
from megatron_troll.training.trainer import PROBED
from tests.dist.harness import RankPool
from tests.dist.layouts_checks import check_metrics, worst_gradient
from tests.dist.methods_batch import Batch, make_methods_batch
from tests.dist.methods_oracle import Expected, Oracle
from tests.dist.methods_table import METHODS
from tests.dist.methods_worker import Cut, Outcome, run_first_steps, run_methods
from tests.dist.tiny import MOE, reference

TOLERANCE = 1e-5
SMALLEST_LOSS = 0.1  # tokens of either sign cancel; below it, differences are measured against this
SHAKE = 1e-5  # of logits, as rounding does
MARGIN = 1e-4
EVERY = tuple(METHODS)
# Whatever crosses responses, ranks or records, one of each kind.
FEW = ("gspo", "dfpo-qp", "cppo-step", "trm-max", "minpro", "tike-sparse-own", "exact", "jackpot", "gae")
LAYOUTS = {
    "one-rank": (1, Cut({}, packed=False, token_budget=96), EVERY),
    "cp2-packed": (2, Cut({"cp": 2}, packed=True, token_budget=48), EVERY),
    "cp2-padded": (2, Cut({"cp": 2}, packed=False, token_budget=96), EVERY),
    "pp2": (2, Cut({"pp": 2}, packed=True, token_budget=24, shared=False), EVERY),
    "dp2": (2, Cut({}, packed=False, token_budget=48), EVERY),
    "tp2-ep2": (2, Cut({"tp": 2, "ep": 2}, packed=True, token_budget=40), EVERY),
    "cp2-dp2": (4, Cut({"cp": 2}, packed=True, token_budget=24), FEW),
    "tp2-pp2-etp2": (4, Cut({"tp": 2, "pp": 2, "etp": 2}, packed=True, token_budget=4096), FEW),
}

# One data-parallel rank has more micro-batches than the other.
WITH_EMPTY_MICRO_BATCHES = {"dp2", "cp2-dp2"}


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_methods_batch()


@pytest.fixture(scope="module")
def oracle(batch: Batch) -> Oracle:
    return Oracle(batch)


@pytest.fixture(scope="module")
def expected(oracle: Oracle) -> dict[str, Expected]:
    return {name: oracle.expected(method) for name, method in METHODS.items()}


@pytest.fixture(scope="module")
def frozen(batch: Batch, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the reference model."""
    folder = tmp_path_factory.mktemp("frozen")
    model = reference(MOE)
    model.load_state_dict(batch.frozen)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def alone(batch: Batch, frozen: str, ranks1: RankPool) -> dict[str, Outcome]:
    _, cut, names = LAYOUTS["one-rank"]
    return ranks1.run(run_methods, cut, batch, frozen, names)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_what_full_rows_give(
    layout: str,
    batch: Batch,
    frozen: str,
    expected: dict[str, Expected],
    alone: dict[str, Outcome],
    request: pytest.FixtureRequest,
) -> None:
    world, cut, names = LAYOUTS[layout]
    if world == 1:
        ranks = [alone]
    else:
        ranks = request.getfixturevalue(f"ranks{world}").run(run_methods, cut, batch, frozen, names)
    for name in names:
        for rank in ranks:
            assert rank[name].loss == pytest.approx(
                expected[name].loss, rel=TOLERANCE, abs=SMALLEST_LOSS * TOLERANCE
            ), name
            check_metrics(rank[name].metrics, alone[name].metrics)
        for wanted in (expected[name].gradients, alone[name].gradients):
            worst, tensor = worst_gradient(ranks[0][name].gradients, wanted)
            assert worst <= TOLERANCE, f"{name}: {tensor} differs by {worst:.1e}"
    assert any(() in rank[names[0]].rollouts for rank in ranks) == (layout in WITH_EMPTY_MICRO_BATCHES)


@pytest.mark.parametrize("layout", ["one-rank", "pp2", "dp2"])
def test_the_first_step_reads_the_old_policy_with_its_own_forward(
    layout: str, batch: Batch, frozen: str, request: pytest.FixtureRequest
) -> None:
    """The loss, metrics and gradients are those beside readings of a pass of its own, to the last bit."""
    world, cut, names = LAYOUTS[layout]
    one_micro_batch = replace(cut, token_budget=4096)
    for each in (cut, one_micro_batch):
        ranks = request.getfixturevalue(f"ranks{world}").run(run_first_steps, each, batch, frozen, names)
        for name in names:
            apart, together = ranks[0][name]
            assert together.loss == apart.loss, name
            assert together.metrics == pytest.approx(apart.metrics, rel=0.0, abs=0.0, nan_ok=True), name
            for tensor, gradient in apart.gradients.items():
                assert torch.equal(together.gradients[tensor], gradient), (name, tensor)


@pytest.mark.parametrize("name", METHODS)
def test_diagnostics_are_those_of_full_rows(
    name: str, expected: dict[str, Expected], alone: dict[str, Outcome]
) -> None:
    metrics = alone[name].metrics
    others = {*PROBED, "entropy", "passes", *(field.name for field in EXPERTS)}
    reported = {metric for metric in metrics if "/" not in metric} - others
    wanted = {metric: expected[name].means[metric] for metric in reported}
    assert {metric: metrics[metric] for metric in reported} == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_micro_batches_split_groups(batch: Batch, alone: dict[str, Outcome]) -> None:
    groups = [{batch.rollouts[i].group for i in held} for held in alone["dfpo-qp"].rollouts]
    assert len(groups) > 1
    assert any(one & other for one in groups for other in groups if one is not other)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_acts_on_some_tokens_and_not_on_others(name: str, expected: dict[str, Expected]) -> None:
    for share in METHODS[name].shares:
        assert 0 < expected[name].means[share] < 1, share


@pytest.mark.parametrize(
    ("name", "key", "lowest", "highest"),
    [("cppo-adaptive", "delta_b_min", 1, 2), ("cppo-step", "delta_b_step", 2, 4)],
)
def test_a_budget_that_adapts_is_within_its_limits(
    name: str, key: str, lowest: int, highest: int, expected: dict[str, Expected]
) -> None:
    least = METHODS[name].config.trust_region.fields[key]
    assert isinstance(least, float)
    assert lowest * least < expected[name].means["delta_b"] < highest * least


def test_no_two_methods_are_the_same(expected: dict[str, Expected]) -> None:
    flat = {name: torch.cat([g.flatten() for g in e.gradients.values()]) for name, e in expected.items()}
    for name, gradient in flat.items():
        for other in flat.keys() - {name}:
            assert (gradient - flat[other]).norm() > 1e-2 * gradient.norm(), (name, other)


@pytest.mark.parametrize("name", ["tike-sparse-own", "tike-sparse-old"])
def test_methods_that_keep_different_tokens_read_several_records(name: str) -> None:
    assert compose(METHODS[name].config).reads.others


@pytest.mark.parametrize("name", METHODS)
def test_rounding_changes_no_choice(name: str, oracle: Oracle) -> None:
    calm, shaken = oracle.slope(METHODS[name], 0.0), oracle.slope(METHODS[name], SHAKE)
    assert (shaken - calm).norm(dim=1).max() < 1e-2 * calm.norm(dim=1).max()


def test_rounding_changes_no_expert(oracle: Oracle) -> None:
    for read in oracle.reads:
        for logits in read.routing:
            top = logits.detach().topk(MOE["num_experts_per_tok"] + 1, 1).values
            assert (top[:, -2] - top[:, -1]).min() > MARGIN
