"""One batch through the real trainer gives the same loss and gradients on every layout, packed or padded, cut
into micro-batches of any size, and they are those of plain autograd on Hugging Face's model.

layouts_batch.py has the batch, layouts_reference.py the plain autograd, layouts_worker.py what ranks run,
layouts_checks.py what is held against what.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_troll.config import Layout, Model, MoE
from tests.dist.layout_table import LAYOUTS, Sizes, expected_groups
from tests.dist.layouts_batch import (
    BOUND,
    DELTA,
    EPS_HIGH,
    EPS_LOW,
    KINDS,
    OPTIMIZER,
    OVERLONG,
    TOOL,
    Batch,
    K,
    make_batch,
)
from tests.dist.layouts_checks import check_equal, check_expected, check_formed
from tests.dist.layouts_reference import Expected, Old, Read, Reference
from tests.dist.layouts_worker import Case, Outcome, RankResult, run_cases, run_probing_all
from tests.dist.tiny import MOE, NEXT

CASES = (
    Case("clip", packed=True, token_budget=64, aux=0.0, shared=True),
    Case("clip", packed=False, token_budget=96, aux=1.0),
    Case("troll-own", packed=True, token_budget=4096, aux=0.0),
    Case("troll-own", packed=False, token_budget=40, aux=1.0),
    Case("troll-old", packed=True, token_budget=1, aux=1.0),
    Case("troll-old", packed=False, token_budget=4096, aux=0.0),
    Case("troll-own", packed=True, token_budget=40, aux=1.0, shared=True),
)
HYBRID_CASES = (CASES[0], CASES[2], CASES[3])
ENGINE = (
    Case("clip", packed=True, token_budget=64, aux=0.0, old="engine"),
    Case("troll-old", packed=True, token_budget=4096, aux=0.0, old="engine"),
)


# Of many micro-batches.
SEVERAL = (CASES[0], CASES[3], CASES[4])
SEVERAL_DENSE = (CASES[0], replace(CASES[4], aux=0.0))


@dataclass(frozen=True)
class Variant:
    """What is not run on every layout. `bucket`: numbers in a bucket of gradients."""

    world: int
    sizes: Sizes
    cases: tuple[Case, ...] = CASES
    kind: str = "moe"
    fields: dict[str, Any] = field(default_factory=dict)
    bucket: int | None = None


def overlapped(
    world: int, sizes: Sizes, kind: str = "moe", distributed: bool = False, cases: tuple[Case, ...] = SEVERAL
) -> Variant:
    """Gradients are reduced while backward runs, most weights in a bucket of their own."""
    optimizer = OPTIMIZER.model_copy(update={"overlap_grad_reduce": True, "distributed": distributed})
    return Variant(world, sizes, cases, kind, {"optimizer": optimizer}, bucket=2000)


VARIANTS = {
    "full-recompute": Variant(2, {"tp": 2, "ep": 2}, fields={"recompute": "full"}),
    "selective-recompute": Variant(2, {"pp": 2}, fields={"recompute": "selective"}),
    "old-engine": Variant(2, {"cp": 2}, ENGINE),
    "recomputed-experts": Variant(
        2,
        {"ep": 2},
        CASES[:2],
        fields={"recompute": "selective", "recompute_modules": ("core_attn", "moe")},
    ),
    "allgather": Variant(2, {"ep": 2}, fields={"moe": MoE(dispatcher="allgather")}),
    "allgather-tp2-ep2": Variant(
        4, {"tp": 2, "ep": 2}, CASES[2:], fields={"moe": MoE(dispatcher="allgather"), "recompute": "full"}
    ),
    "distributed-optimizer": Variant(
        4,
        {"tp": 2, "ep": 2},
        CASES[-1:],
        fields={"optimizer": OPTIMIZER.model_copy(update={"distributed": True})},
    ),
    "hybrid-full-recompute": Variant(2, {"tp": 2, "ep": 2}, HYBRID_CASES, "hybrid", {"recompute": "full"}),
    "hybrid-selective-recompute": Variant(2, {"cp": 2}, HYBRID_CASES, "hybrid", {"recompute": "selective"}),
    "tied-dense": Variant(4, {"tp": 2, "pp": 2}, (CASES[0], CASES[5]), kind="tied-dense"),
    "soft-cap": Variant(2, {"tp": 2}, (CASES[0], CASES[2], CASES[5]), kind="capped-dense"),
    "overlapped": overlapped(2, {}),
    "overlapped-distributed": overlapped(4, {"tp": 2, "ep": 2}, distributed=True),
    "overlapped-interleaved": overlapped(4, {"pp": 2, "vpp": 2}),
    "overlapped-tied": overlapped(2, {}, "tied-dense", cases=SEVERAL_DENSE),
    "overlapped-tied-stages": overlapped(4, {"pp": 2}, "tied-dense", cases=SEVERAL_DENSE),
}
REFERENCES: tuple[tuple[str, Old], ...] = (
    ("moe", "trainer"),
    ("moe", "engine"),
    ("tied-dense", "trainer"),
    ("hybrid", "trainer"),
    ("capped-dense", "trainer"),
)
References = dict[tuple[str, Old], Reference]
MARGIN = 1e-4  # rounding moves logits, probabilities, ratios and KLs by a few 1e-6


@pytest.fixture(scope="module")
def batches() -> dict[str, Batch]:
    return {kind: make_batch(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def batch(batches: dict[str, Batch]) -> Batch:
    return batches["moe"]


@pytest.fixture(scope="module")
def references(batches: dict[str, Batch]) -> References:
    return {(kind, old): Reference(batches[kind], old) for kind, old in REFERENCES}


@pytest.fixture(scope="module")
def reference(references: References) -> Reference:
    return references["moe", "trainer"]


@pytest.fixture(scope="module")
def expected(reference: Reference) -> list[Expected]:
    """Of CASES."""
    return [reference.expected(case.objective, case.aux) for case in CASES]


@pytest.fixture(scope="module")
def alone(batch: Batch, request: pytest.FixtureRequest) -> list[Outcome]:
    """Of CASES, on one rank."""
    (result,) = run_on(1, model({}), batch, CASES, request)
    return result.outcomes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_loss_and_gradients_of_plain_autograd(
    layout: str, batch: Batch, expected: list[Expected], alone: list[Outcome], request: pytest.FixtureRequest
) -> None:
    world, sizes = LAYOUTS[layout]
    results = run_on(world, model(sizes), batch, CASES, request)
    for result in results:
        check_formed(result, world, sizes, MOE)
        check_expected(result, expected)
        check_equal(result, alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_gives_the_loss_and_gradients_of_plain_autograd_to_a_hybrid(
    layout: str, batches: dict[str, Batch], references: References, request: pytest.FixtureRequest
) -> None:
    """Whose layers of linear attention carry a state: each sequence alone and unpadded is the reference."""
    world, sizes = LAYOUTS[layout]
    results = run_on(world, model(sizes), batches["hybrid"], HYBRID_CASES, request)
    reference = references["hybrid", "trainer"]
    expected = [reference.expected(case.objective, case.aux) for case in HYBRID_CASES]
    for result in results:
        check_formed(result, world, sizes, NEXT)
        check_expected(result, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_gives_the_loss_and_gradients_of_plain_autograd(
    name: str, batches: dict[str, Batch], references: References, request: pytest.FixtureRequest
) -> None:
    variant = VARIANTS[name]
    config, batch = model(variant.sizes, **variant.fields), batches[variant.kind]
    results = run_on(variant.world, config, batch, variant.cases, request, variant.bucket)
    expected = [references[variant.kind, c.old].expected(c.objective, c.aux) for c in variant.cases]
    for result in results:
        assert result.groups == expected_groups(variant.world, variant.sizes)
        check_expected(result, expected)
        if "allgather" in name:
            assert all(("ep", "alltoall_base_") not in outcome.collectives for outcome in result.outcomes)


def test_reported_fractions_and_mismatch_are_those_of_plain_autograd(
    batch: Batch, reference: Reference, alone: list[Outcome]
) -> None:
    for case, outcome in zip(CASES, alone):
        name = "clipped" if case.objective == "clip" else "projected"
        beyond = clipped(reference) if name == "clipped" else reference.kl_before(case.objective) > BOUND
        assert outcome.metrics[name] == pytest.approx(float(beyond.double().mean()))
        at = reference.tokens.target[:, None]
        logp = reference.before.logits.log_softmax(1).gather(1, at)[:, 0]
        gap = logp - torch.cat([torch.from_numpy(r.logp[r.mask > 0]) for r in batch.rollouts])
        wanted = {
            "kl": (gap.expm1() - gap).mean(),
            "kl/max": (gap.expm1() - gap).max(),
            "gap/max": gap.abs().max(),
        }
        assert outcome.mismatch == {
            f"rollout_trainer_{name}": pytest.approx(float(value), rel=1e-2) for name, value in wanted.items()
        }


@pytest.mark.parametrize("sizes", [{}, {"tp": 2, "ep": 2}], ids=["one-rank", "tp2"])
def test_what_a_sparse_record_cannot_show_is_measured_on_whole_rows(
    sizes: Sizes, batch: Batch, reference: Reference, request: pytest.FixtureRequest
) -> None:
    """At every position: the mass that left the old support, and the true KL beside the sparse one."""
    before, now = (read.logits.detach().log_softmax(1) for read in (reference.before, reference.now))
    ids, kept = reference.kept_before
    left = (before.exp() - now.exp()).gather(1, ids).where(kept, 0.0).sum(1)
    true_kl = (now.exp() * (now - before)).sum(1)
    pool = request.getfixturevalue(f"ranks{sizes.get('tp', 1)}")
    for result in pool.run(run_probing_all, model(sizes), batch, CASES[-1:]):
        metrics = result.outcomes[0].metrics
        assert metrics["outside_mass"] == pytest.approx(float(left.mean()), abs=1e-6)
        assert metrics["outside_mass/max"] == pytest.approx(float(left.max()), abs=1e-6)
        assert metrics["true_kl"] == pytest.approx(float(true_kl.mean()), rel=1e-3)
        assert metrics["sparse_kl"] == pytest.approx(metrics["kl_before"], rel=1e-6)
    assert left.max() > 1e-3


def test_micro_batches_of_every_size_were_run(alone: list[Outcome]) -> None:
    counts = {case.token_budget: outcome.micro_batches for case, outcome in zip(CASES, alone)}
    assert counts[4096] == 1
    assert counts[1] == 10
    assert 1 < counts[96] < counts[40] < 10


def model(sizes: Sizes, **fields: Any) -> Model:
    return Model.model_validate(
        {"path": "none", "dtype": "fp32", "layout": Layout(**sizes), "optimizer": OPTIMIZER} | fields
    )


def run_on(
    world: int,
    config: Model,
    batch: Batch,
    cases: tuple[Case, ...],
    request: pytest.FixtureRequest,
    bucket: int | None = None,
) -> list[RankResult]:
    return request.getfixturevalue(f"ranks{world}").run(run_cases, config, batch, cases, bucket)


@pytest.fixture(scope="module", params=REFERENCES, ids="-".join)
def each(request: pytest.FixtureRequest, references: References) -> Reference:
    return references[request.param]


def test_the_batch_reaches_both_sides_of_every_bound(each: Reference) -> None:
    rollouts = each.batch.rollouts
    positive = each.tokens.advantage > 0
    assert both(clipped(each)[positive])
    assert both(clipped(each)[~positive])
    for objective in ("troll-own", "troll-old"):
        assert both(each.kl_before(objective) > BOUND)
    for read, (_, kept) in ((each.before, each.kept_before), (each.now, each.kept_now)):
        assert both(ended_by_k(read))
        assert both(kept[:, K:].any(1))  # the sampled token, where the top K lack it
    assert 0 < rollouts[TOOL[0]].mask.sum() < len(rollouts[TOOL[0]].mask)
    assert rollouts[OVERLONG].mask.sum() == 0


def test_no_discrete_choice_is_near_its_border(each: Reference) -> None:
    ratio = each.ratio.detach()
    assert min((ratio - 1 - EPS_HIGH).abs().min(), (ratio - 1 + EPS_LOW).abs().min()) > MARGIN
    for objective in ("troll-own", "troll-old"):
        assert (each.kl_before(objective) / BOUND - 1).abs().min() > MARGIN
    for read in (each.before, each.now):
        for logits in read.routing:
            top = logits.detach().topk(MOE["num_experts_per_tok"] + 1, 1).values
            assert (top[:, -2] - top[:, -1]).min() > MARGIN
        logits = read.logits.detach().sort(1, descending=True).values
        covered = logits.softmax(1).cumsum(1)[:, :K]
        assert (covered - (1 - DELTA)).abs().min() > MARGIN
        last, next_ = logits[ended_by_k(read)][:, K - 1 : K + 1].unbind(1)
        assert (last - next_).min() > MARGIN


def test_the_balancing_loss_shows_in_the_gradients(reference: Reference) -> None:
    for objective in ("clip", "troll-own", "troll-old"):
        without, with_it = (reference.expected(objective, aux).gradients for aux in (0.0, 1.0))
        for layer in range(MOE["num_hidden_layers"]):
            name = f"model.layers.{layer}.mlp.gate.weight"
            assert (with_it[name] - without[name]).norm() > 0.1 * without[name].norm()


def both(marked: Tensor) -> bool:
    return bool(marked.any()) and not bool(marked.all())


def clipped(reference: Reference) -> Tensor:
    """[N] whether the ratio is beyond the bound that the advantage's sign makes count."""
    ratio, advantage = reference.ratio.detach(), reference.tokens.advantage
    return torch.where(advantage > 0, ratio > 1 + EPS_HIGH, ratio < 1 - EPS_LOW)


def ended_by_k(read: Read) -> Tensor:
    """[N] whether the K largest logits hold less than 1 - DELTA of the mass."""
    return read.logits.detach().softmax(1).topk(K, 1).values.sum(1) < 1 - DELTA
