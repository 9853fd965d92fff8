"""GSPO, DFPO and the group transforms."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose, transforms
from tests.unit.objectives.rows import Rows, gradient, sample, slope, statistics_of

CLIP = {"name": "clip", "eps_low": 0.1, "eps_high": 0.2}
TRANSFORMS = ("min", "qp", "truncate", "orth")


def objective(ratio: str, region: dict | None = None, **fields: object) -> Objective:
    return compose(
        ObjectiveConfig(
            ratio=Slot.model_validate({"name": ratio} | fields),
            trust_region=Slot.model_validate(region or CLIP),
        )
    )


def dfpo(transform: str, region: dict | None = None, **fields: object) -> Objective:
    return objective("dfpo", region, transform=transform, allow_negative=transform == "orth", **fields)


def responses(lengths: list[int], **how: object) -> Rows:
    """With the weights of seq-mean-token-mean."""
    rows = sample(lengths, **how)  # pyright: ignore[reportArgumentType]
    filled = sum(n > 0 for n in lengths)
    return replace(rows, weight=1.0 / (filled * torch.tensor(lengths)[rows.owner].double()))


def sequence_ratios(rows: Rows, logits: Tensor) -> Tensor:
    """s [S], 1 for an empty response."""
    at = rows.target[:, None]
    log_r = (logits.log_softmax(1) - rows.old.log_softmax(1)).gather(1, at)[:, 0]
    sums = log_r.new_zeros(len(rows.group)).index_add(0, rows.owner, log_r)
    return (sums / rows.owner.bincount(minlength=len(rows.group)).clamp(min=1)).exp()


def test_gspo_gradient_against_differences():
    rows = responses([4, 3, 0, 5], vocab=6, change=1.0)

    def value(logits: Tensor) -> Tensor:
        s, a = sequence_ratios(rows, logits), rows.advantage
        return torch.minimum(s * a, s.clamp(0.9, 1.2) * a)[[0, 1, 3]].mean()

    assert torch.allclose(gradient(objective("gspo"), rows), slope(value, rows.new), atol=1e-8)


def test_gspo_of_one_token_responses_is_the_token_ratio():
    rows = responses([1, 1, 1, 1], change=1.0)
    assert torch.allclose(gradient(objective("gspo"), rows), gradient(objective("token"), rows))


def test_gspo_under_troll_is_of_the_projected_policy():
    """One-token responses, where it is TROLL itself."""
    rows = responses([1, 1, 1, 1], change=1.0)
    troll = {"name": "troll", "bound": 0.05}
    assert torch.allclose(
        gradient(objective("gspo", troll), rows), gradient(objective("token", troll), rows), atol=1e-12
    )


def held(rows: Rows, coefficient: Tensor) -> Tensor:
    """d/d logits of sum weight c_i log pi, c [S] held."""
    c = (rows.weight * coefficient[rows.owner]).detach()
    return slope(
        lambda logits: (c * logits.log_softmax(1).gather(1, rows.target[:, None])[:, 0]).sum(), rows.new
    )


def transformed(rows: Rows, transform: str, logits: Tensor) -> Tensor:
    """s~ [S], by the pure functions that the golden numbers check."""
    s, a = sequence_ratios(rows, logits), rows.advantage
    counted = torch.where(a >= 0, s.clamp(max=1.2), s.clamp(min=0.9))
    arguments = counted, a, rows.group, int(rows.group.max()) + 1
    return {
        "min": lambda: transforms.lowest(*arguments),
        "qp": lambda: transforms.nearest(*arguments),
        "truncate": lambda: transforms.rebalanced(*arguments, 1e-6),
        "orth": lambda: transforms.orthogonal(*arguments),
    }[transform]()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_dfpo_gradient_flows_through_log_pi_alone(transform):
    rows = responses([4, 3, 0, 5, 2, 1], vocab=6, change=1.0, group=3)
    weights = transformed(rows, transform, rows.new)
    expected = held(rows, weights * rows.advantage)
    assert torch.allclose(gradient(dfpo(transform), rows), expected, atol=1e-8)
    assert torch.allclose(gradient(dfpo(transform, scale=0.5), rows), 0.5 * expected, atol=1e-8)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_dfpo_without_stop_gradient_is_the_product_rule(transform):
    rows = responses([4, 3, 0, 5, 2, 1], vocab=6, change=1.0, group=3)

    def value(logits: Tensor) -> Tensor:
        c = (transformed(rows, transform, logits) * rows.advantage)[rows.owner]
        return (rows.weight * c * logits.log_softmax(1).gather(1, rows.target[:, None])[:, 0]).sum()

    found = gradient(dfpo(transform, stop_gradient=False), rows)
    assert torch.allclose(found, slope(value, rows.new), atol=1e-7)
    assert not torch.allclose(found, gradient(dfpo(transform), rows), atol=1e-4)


def test_a_sequence_that_gspo_clips_keeps_its_gradient_unless_dropped():
    rows = responses([3, 3, 3, 3], change=2.0)
    s, a = sequence_ratios(rows, rows.new.detach()), rows.advantage
    clipped = ((a > 0) & (s > 1.2)) | ((a < 0) & (s < 0.9))
    assert clipped.any()
    of_tokens = clipped[rows.owner]
    literal, dropped = gradient(dfpo("min"), rows), gradient(dfpo("min", drop_clipped=True), rows)
    assert literal[of_tokens].abs().sum(1).min() > 0
    assert (dropped[of_tokens] == 0).all()
    assert torch.equal(dropped[~of_tokens], literal[~of_tokens])
    gspo = gradient(objective("gspo"), rows)
    assert (gspo[of_tokens] == 0).all()


def test_equal_rewards_have_no_gradient():
    rows = responses([3, 2, 4, 1])
    rows = replace(rows, advantage=torch.zeros(4, dtype=torch.float64))
    for transform in TRANSFORMS:
        assert (gradient(dfpo(transform), rows) == 0).all()


def test_statistics_of_context_parallel_ranks_add_up():
    """Each rank holds its own tokens, and every response."""
    rows, method = responses([4, 3, 2, 5]), dfpo("qp")
    inputs = rows.inputs(method)
    whole = method.loss(inputs, statistics_of(method, [inputs])).loss
    parts = []
    for rank in (0, 1):
        mine = (torch.arange(len(rows.owner)) % 2 == rank).nonzero()[:, 0]
        tokens = ("new", "old", "mu", "reference", "target", "weight", "uniform", "owner")
        part = replace(rows, **{name: getattr(rows, name)[mine] for name in tokens})
        parts.append(method.statistics(part.inputs(method)))
    summed = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert torch.allclose(method.loss(inputs, summed).loss, whole)


def test_reports_once_a_response():
    rows = responses([4, 3, 0, 5], change=1.0)
    method = dfpo("qp")
    inputs = rows.inputs(method)
    found = method.loss(inputs, statistics_of(method, [inputs])).per_token
    s = sequence_ratios(rows, rows.new.detach())
    a = rows.advantage
    values = found["sequence_ratio"]
    assert values[~values.isnan()].tolist() == pytest.approx(s[[0, 1, 3]].tolist())
    before = found["asymmetry_before"]
    bound = method.trust_region.limit(s, a)
    spread = [float((bound * a)[group].var(correction=0)) for group in (slice(0, 2), slice(2, 4))]
    assert before[~before.isnan()].tolist() == pytest.approx([spread[0], spread[0], spread[1]])
    assert found["group_imbalance"].nan_to_num(0).max() < 1e-9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": torch.tensor([0, 0, 1, 2])}, r"prompts \[1, 2\] have one response in the step"),
        ({"advantage": torch.tensor([1.0, -1.0, 0.5, 0.5]).double()}, r"of prompts \[1\] do not sum to 0"),
    ],
)
def test_groups_that_cannot_cancel_are_refused(change, message):
    rows, method = replace(responses([2, 2, 2, 2]), **change), dfpo("qp")
    inputs = rows.inputs(method)
    with pytest.raises(ValueError, match=message):
        method.loss(inputs, statistics_of(method, [inputs]))


def test_what_is_missing_is_named():
    rows, method = responses([2, 2]), dfpo("qp")
    inputs = rows.inputs(method)
    with pytest.raises(ValueError, match="needs the statistics of the step"):
        method.loss(inputs)
    with pytest.raises(ValueError, match="one advantage for each"):
        method.statistics(replace(inputs, response_advantage=None))


groups = st.lists(
    st.lists(st.tuples(st.floats(0.01, 5.0), st.floats(-2.0, 2.0)), min_size=2, max_size=8),
    min_size=1,
    max_size=4,
)


def arguments(drawn: list) -> tuple[Tensor, Tensor, Tensor, int]:
    s = torch.tensor([w for g in drawn for w, _ in g], dtype=torch.float64)
    group = torch.tensor([i for i, g in enumerate(drawn) for _ in g])
    a = torch.cat([torch.tensor([x for _, x in g], dtype=torch.float64) for g in drawn])
    a = a - transforms.totals(a, group, len(drawn)) / transforms.totals(torch.ones_like(a), group, len(drawn))
    return s, a, group, len(drawn)


@settings(deadline=None)
@given(groups)
def test_transforms_cancel_and_stay_positive(drawn):
    s, a, group, n = arguments(drawn)
    for weights in (
        transforms.lowest(s, a, group, n),
        transforms.nearest(s, a, group, n),
        transforms.rebalanced(s, a, group, n, 1e-6),
    ):
        assert transforms.totals(a * weights, group, n).abs().max() < 1e-10
        assert (weights >= 0).all()
    assert transforms.totals(a * transforms.orthogonal(s, a, group, n), group, n).abs().max() < 1e-9


@settings(deadline=None)
@given(groups, st.integers(0, 10_000))
def test_qp_is_the_nearest_point(drawn, seed):
    """(s - v).(u - v) <= 0 for every other point u of the feasible set, which is convex."""
    s, a, group, n = arguments(drawn)
    v = transforms.nearest(s, a, group, n)
    generator = torch.Generator().manual_seed(seed)
    other = transforms.rebalanced(
        5 * torch.rand(s.shape, generator=generator, dtype=torch.float64), a, group, n, 1e-6
    )
    assert transforms.totals((s - v) * (other - v), group, n).max() < 1e-8


@settings(deadline=None)
@given(groups)
def test_orth_is_qp_where_nothing_is_negative(drawn):
    s, a, group, n = arguments(drawn)
    free = transforms.orthogonal(s, a, group, n)
    fine = transforms.totals((free < 0).double(), group, n) == 0
    assert torch.allclose(free[fine], transforms.nearest(s, a, group, n)[fine], atol=1e-9)
