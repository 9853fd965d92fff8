"""Estimators of KL(new || reference): gradients, expectations by enumeration, limits, bad input."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck

from megatron_troll.config import ConfigError, ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.objectives.reference import partial_kl
from tests.unit.objectives.rows import Rows, sample

V = 12
DENSE = ("k1", "k2", "k3", "k3_k2grad", "exact", "tike")


def objective(name: str, **fields: object) -> Objective:
    slot = Slot.model_validate({"name": name, "beta": 1.0} | fields)
    return compose(ObjectiveConfig(trust_region=Slot(name="none"), kl=slot))


def penalty(rows: Rows, name: str, **fields: object) -> Tensor:
    """beta K [N], differentiable in rows.new."""
    method = objective(name, **fields)
    inputs = rows.inputs(method)
    return method.kl.penalty(inputs, method.trust_region.policy(inputs, None), None).value


def every_token(seed: int, change: float = 0.5) -> Rows:
    """One position, once for each token that could have been drawn."""
    one = sample([1, 1], V, change, seed)
    at = torch.zeros(V, dtype=torch.int64)
    return replace(
        one,
        new=one.new.detach()[at].requires_grad_(),
        old=one.old[at],
        mu=one.mu[at],
        reference=one.reference[at],
        target=torch.arange(V),
        weight=torch.ones(V, dtype=torch.float64),
        uniform=torch.zeros(V, dtype=torch.float64),
        owner=torch.arange(V) % 2,
    )


def full_kl(rows: Rows) -> Tensor:
    logp = rows.new.log_softmax(1)
    return (logp.exp() * (logp - rows.reference.log_softmax(1))).sum(1)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("k1", {}),
        ("k2", {}),
        ("k3", {}),
        ("k3", {"is_weight": "token", "diff_is": True}),
        ("exact", {}),
        ("tike", {"k": 4, "is_weight": "none"}),
        ("tike", {"k": 4, "is_weight": "none", "support": "old", "union_sampled": True}),
        ("tike", {"k": 4, "diff_is": True}),
        ("tike", {"k": 4, "is_weight": "none", "tail": "horvitz", "non_negative": True}),
        ("tike_sparse", {"k": 4, "p_d": 1e-3}),
        ("tike_sparse", {"k": 4, "p_d": 1e-3, "support": "own", "delta": 1e-2}),
    ],
)
def test_gradient_through_the_objective(name, fields):
    rows, method = sample([3, 2], V, seed=1), objective(name, **fields)

    def loss(new: Tensor) -> Tensor:
        return method.loss(replace(rows, new=new).inputs(method)).loss

    assert gradcheck(loss, rows.new)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "tike"])
def test_the_importance_weight_is_a_constant_by_default(name):
    """The penalty's gradient is r times that of the unweighted one."""
    rows = sample([4, 3], V, seed=2)
    at = rows.target[:, None]
    r = (rows.new.log_softmax(1) - rows.old.log_softmax(1)).gather(1, at)[:, 0].exp().detach()
    fields = {"k": 4} if name == "tike" else {}
    weighted = penalty(rows, name, is_weight="token", **fields)
    plain = r * penalty(rows, name, is_weight="none", **fields)
    assert torch.allclose(weighted, plain)
    assert torch.allclose(grad(weighted.sum(), rows.new)[0], grad(plain.sum(), rows.new)[0])


def test_k3_with_the_gradient_of_k2():
    rows = sample([4, 3], V, seed=3)
    mixed, k2, k3 = (penalty(rows, name) for name in ("k3_k2grad", "k2", "k3"))
    assert torch.allclose(mixed, k3)
    assert torch.allclose(grad(mixed.sum(), rows.new)[0], grad(k2.sum(), rows.new)[0])


def test_whole_vocabulary_is_exact():
    """TIKE with k = V, and sparse TIKE with nothing left out, are the exact KL."""
    rows = sample([4, 3], V, seed=4)
    exact = penalty(rows, "exact")
    assert torch.allclose(exact, full_kl(rows))
    (expected,) = grad(exact.sum(), rows.new)
    for name, fields in (("tike", {"is_weight": "none"}), ("tike_sparse", {"delta": 0.0, "p_d": 1e-4})):
        for support in ("own", "old"):
            value = penalty(rows, name, k=V + 2, support=support, **fields)
            assert torch.allclose(value, exact)
            assert torch.allclose(grad(value.sum(), rows.new)[0], expected, atol=1e-12)


def test_on_policy_means():
    """Over tokens drawn from new: k1 and k3 have the value of the KL, k1 no gradient, k2 the KL's, k3 that
    of KL(reference || new)."""
    rows = every_token(5)
    p = rows.new.softmax(1)[0].detach()
    (kl_gradient,) = grad(full_kl(rows)[0], rows.new)
    forward = torch.nn.functional.kl_div(
        rows.new.log_softmax(1), rows.reference.log_softmax(1), reduction="none", log_target=True
    )
    (forward_gradient,) = grad(forward[0].sum(), rows.new)
    mean = {name: (p * penalty(rows, name, clamp=False)).sum() for name in ("k1", "k2", "k3")}
    gradient = {name: grad(value, rows.new)[0].sum(0) for name, value in mean.items()}
    assert mean["k1"].item() == pytest.approx(full_kl(rows)[0].item())
    assert mean["k3"].item() == pytest.approx(full_kl(rows)[0].item())
    assert gradient["k1"].abs().max() < 1e-12
    assert torch.allclose(gradient["k2"], kl_gradient.sum(0))
    assert torch.allclose(gradient["k3"], forward_gradient.sum(0))


@pytest.mark.parametrize("non_negative", [False, True])
@pytest.mark.parametrize("is_weight", ["none", "token"])
def test_horvitz_tail_is_unbiased_off_policy(is_weight, non_negative):
    """Over tokens drawn from old, the mean is the full KL and its gradient."""
    rows = every_token(6)
    q = rows.old.softmax(1)[0]
    fields = {"k": 3, "tail": "horvitz", "is_weight": is_weight, "non_negative": non_negative}
    mean = (q * penalty(rows, "tike", **fields)).sum()
    assert mean.item() == pytest.approx(full_kl(rows)[0].item())
    (expected,) = grad(full_kl(rows)[0], rows.new)
    assert torch.allclose(grad(mean, rows.new)[0].sum(0), expected.sum(0))


def test_deepseek_form_has_the_true_gradient_off_policy():
    rows = every_token(7)
    q = rows.old.softmax(1)[0]
    mean = (q * penalty(rows, "k3", is_weight="token", diff_is=True, clamp=False)).sum()
    (expected,) = grad(full_kl(rows)[0], rows.new)
    assert torch.allclose(grad(mean, rows.new)[0].sum(0), expected.sum(0))


@pytest.mark.parametrize("support", ["own", "old"])
def test_sparse_tike_reads_the_support_alone(support):
    """No gradient outside S, sum 0 on it, and no change where the other logits move (ALGORITHMS 1.7)."""
    rows = sample([5, 4], V, seed=8)
    fields = {"k": 4, "p_d": 1e-4, "support": support}
    record = rows.inputs(objective("tike_sparse", **fields)).new.topk
    assert record is not None
    inside = torch.zeros_like(rows.old, dtype=torch.bool)
    inside = inside.scatter(1, torch.where(record.valid, record.ids, record.ids[:, :1]), True)
    value = penalty(rows, "tike_sparse", **fields)
    moved = replace(rows, new=torch.where(inside, rows.new, rows.new - 1.0))
    assert torch.allclose(penalty(moved, "tike_sparse", **fields), value)
    (gradient,) = grad(value.sum(), rows.new)
    assert (gradient[~inside] == 0).all()
    assert gradient[inside].abs().max() > 1e-3
    assert gradient.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("name", [*DENSE, "tike_sparse"])
def test_masked_tokens_have_no_gradient(name):
    rows, method = sample([3, 2], V, seed=9), objective(name, **({"k": 4} if "tike" in name else {}))
    loss = method.loss(replace(rows, weight=torch.zeros(5, dtype=torch.float64)).inputs(method)).loss
    assert loss.item() == 0
    assert (grad(loss, rows.new)[0] == 0).all()


@pytest.mark.parametrize("name", ["tike", "tike_sparse"])
def test_impossible_tokens(name):
    """A token that the reference forbids counts as the floor and is reported; one that the new policy forbids
    adds nothing and has no gradient."""
    rows = sample([2, 2], V, seed=10)
    forbidden = rows.old.argmax(1)
    rows.reference[0, forbidden[0]] = float("-inf")
    with torch.no_grad():
        rows.new[1, forbidden[1]] = float("-inf")
    method = objective(name, k=4, support="old")
    terms = method.loss(rows.inputs(method))
    (gradient,) = grad(terms.loss, rows.new)
    assert terms.per_token["reference_kl_floored"].tolist() == [1, 0, 0, 0]
    assert terms.per_token["reference_kl"].isfinite().all()
    assert terms.per_token["reference_kl"][0] > 2
    assert gradient.isfinite().all()
    assert gradient[1, forbidden[1]] == 0


def test_clamps_of_verl():
    """Beyond |x| = 20 and k3 = 10 the value stays and the gradient is 0; `clamp: false` lifts both."""
    rows = sample([1, 1], V, seed=11)
    with torch.no_grad():
        rows.new[0, rows.target[0]] = -60.0
    limited = {name: penalty(rows, name) for name in ("k1", "k2", "k3")}
    assert [limited[name][0].item() for name in limited] == [-20.0, 200.0, 10.0]
    assert all((grad(value[0], rows.new)[0] == 0).all() for value in limited.values())
    method = objective("k1")
    assert method.loss(rows.inputs(method)).per_token["reference_kl_clamped"].tolist() == [1, 0]
    assert penalty(rows, "k1", clamp=False)[0].item() < -40
    assert penalty(rows, "k3", clamp=False)[0].item() > 1e10


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, V), st.floats(0.01, 5.0))
def test_signs(seed, k, change):
    """k2, k3, the generalised sum and sparse TIKE are never negative, whatever the set."""
    rows = sample([2, 2], V, change, seed)
    logp, ref = rows.new.log_softmax(1), rows.reference.log_softmax(1)
    kept = logp.argsort(1, descending=True).argsort(1) < k
    assert (partial_kl(logp, ref, kept, non_negative=True) > -1e-12).all()
    assert (penalty(rows, "tike_sparse", k=k, p_d=1e-4) > -1e-12).all()
    assert (penalty(rows, "k2") >= 0).all()
    assert (penalty(rows, "k3") >= 0).all()


@pytest.mark.parametrize("name", [*DENSE, "tike_sparse"])
def test_diagnostics_are_declared_and_detached(name):
    rows, method = sample([4, 3], V, seed=12), objective(name, **({"k": 4} if "tike" in name else {}))
    per_token = method.loss(rows.inputs(method)).per_token
    assert per_token.keys() <= method.diagnostics.keys()
    assert "reference_kl" in per_token
    assert all(value.shape == (7,) and not value.requires_grad for value in per_token.values())


def test_what_tike_reports():
    rows, method = sample([10, 10], V, change=0.5, seed=13), objective("tike", k=2)
    per_token = method.loss(rows.inputs(method)).per_token
    p = rows.new.detach().softmax(1)
    assert torch.allclose(per_token["reference_kl_mass"], p.topk(2).values.sum(1))
    outside = (p.topk(2).indices != rows.target[:, None]).all(1)
    assert torch.equal(per_token["reference_kl_sampled_outside"].bool(), outside)
    assert torch.equal(per_token["reference_kl_negative"].bool(), per_token["reference_kl"] < 0)
    assert 0 < per_token["reference_kl_negative"].mean() < 1


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("k1", {"beta": -0.1}, r"objective.kl.beta: got -0.1, expected a number >= 0"),
        ("k3", {"diff_is": True}, "diff_is: true needs is_weight: token"),
        ("tike", {"k": 0}, r"objective.kl.k: got 0, expected an integer >= 1"),
        ("tike", {"support": "new"}, r"objective.kl.support: .*own, old"),
        ("tike", {"union_sampled": True, "tail": "horvitz"}, "the tail is never sampled"),
        ("tike", {"is_weight": "none", "diff_is": True}, "diff_is: true needs is_weight: token"),
        ("tike_sparse", {"delta": 1.0}, r"objective.kl.delta: got 1.0, expected a number >= 0 and < 1"),
        ("exact", {"k": 3}, "objective.kl.k: unknown key"),
    ],
)
def test_bad_fields_are_refused(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        objective(name, **fields)


@pytest.mark.parametrize("name", [*DENSE, "tike_sparse"])
def test_a_missing_reference_is_refused(name):
    rows, method = sample([2, 2], V), objective(name, **({"k": 4} if "tike" in name else {}))
    inputs = rows.inputs(method)
    inputs = replace(inputs, reference=None, new=replace(inputs.new, reference_kl=None))
    with pytest.raises(ValueError, match=r"set models\.reference"):
        method.loss(inputs)


@pytest.mark.parametrize("name", ["tike", "tike_sparse"])
def test_a_record_that_keeps_too_little_is_refused(name):
    rows, method = sample([2, 2], V), objective(name, k=3)
    inputs = rows.inputs(method)
    with pytest.raises(ValueError, match=r"the new record keeps the top 3 tokens; k=6 needs more"):
        objective(name, k=6).loss(inputs)


def test_p_d_is_checked_against_the_vocabulary():
    with pytest.raises(ValueError, match="lower p_d"):
        objective("tike_sparse", p_d=1e-5).check(151_936)
    objective("tike_sparse").check(151_936)
