import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose
from megatron_troll.types import HeadOutputs, ObjectiveInputs
from tests.unit.golden.records import at_ids, inputs_of, topk_record
from tests.unit.objectives.oracle import dense_sparsified, projected, troll

V, K, DELTA, P_D = 24, 6, 1e-2, 1e-5


def objective(**fields: object) -> Objective:
    own = {"k": K, "delta": DELTA, "p_d": P_D, "support": "own"}
    return compose(ObjectiveConfig(trust_region=Slot.model_validate({"name": "troll"} | own | fields)))


def policies(rows: int, change: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Old and new logits [rows, V], sampled tokens and advantages."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    old = 2 * normal(rows, V)
    target = torch.multinomial(old.softmax(1), 1, generator=generator)[:, 0]
    return old, (old + change * normal(rows, V)).requires_grad_(), target, normal(rows)


def batch(method: Objective, old: Tensor, new: Tensor, target: Tensor, advantage: Tensor) -> ObjectiveInputs:
    reads = method.reads.topk
    assert reads is not None
    prepared = method.prepare_old(HeadOutputs(None, topk_record(old, target, reads.k, reads.delta), None))
    assert prepared.topk is not None
    if reads.kind == "old":
        record = at_ids(new, prepared.topk)
    else:
        record = topk_record(new, target, reads.k, reads.delta)
    return inputs_of(HeadOutputs(None, record, None), prepared, advantage, torch.full_like(advantage, 0.25))


@pytest.mark.parametrize("support", ["own", "old"])
@pytest.mark.parametrize("change", [0.1, 0.7, 3.0])
def test_loss_and_gradient_against_dense_autograd(support, change):
    """Sparse gradients are exact, and 0 outside the support (ALGORITHMS 1.7)."""
    old, new, target, advantage = policies(40, change)
    method = objective(support=support, bound=0.05, alpha=0.7)
    inputs = batch(method, old, new, target, advantage)
    result = method.loss(inputs)
    result.loss.backward()
    assert new.grad is not None
    new_topk, old_topk = inputs.new.topk, inputs.old.topk
    assert new_topk is not None
    assert old_topk is not None

    dense = new.detach().clone().requires_grad_()
    p = dense_sparsified(dense, new_topk.ids, new_topk.valid, P_D)
    q = dense_sparsified(old, old_topk.ids, old_topk.valid, P_D)
    expected = troll(p, q, target, advantage, 0.05, 0.7)
    (-0.25 * expected.sum()).backward()
    assert dense.grad is not None

    assert torch.allclose(result.per_token["objective"], expected, rtol=1e-9, atol=1e-9)
    assert torch.allclose(new.grad, dense.grad, rtol=1e-9, atol=1e-8)
    inside = torch.zeros(40, V, dtype=torch.bool)
    inside = inside.scatter(1, torch.where(new_topk.valid, new_topk.ids, new_topk.ids[:, :1]), True)
    assert (new.grad[~inside] == 0).all()
    assert dense.grad[~inside].abs().max() < 1e-12
    assert new.grad.sum(1).abs().max() < 1e-12


def test_the_oracle_has_a_gradient_where_the_policies_are_equal():
    """The first row, inside the bound; the second is projected."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]], dtype=torch.float64, requires_grad=True)
    q = p.detach()[[0, 0]]
    (gradient,) = torch.autograd.grad(projected(p, q, 0.05)[:, 0].sum(), p)
    assert gradient[0].tolist() == [1.0, 0.0, 0.0]
    assert torch.isfinite(gradient).all()


def test_whole_vocabulary_is_the_importance_weighted_policy_gradient():
    """K >= V and a ball that holds everything: r A on the full softmax."""
    old, new, target, advantage = policies(10, 0.5)
    method = objective(k=V + 3, delta=0.0, bound=1e6)
    result = method.loss(batch(method, old, new, target, advantage))
    at = target[:, None]
    log_ratio = new.log_softmax(1).gather(1, at) - old.log_softmax(1).gather(1, at)
    expected = -0.25 * (log_ratio[:, 0].exp() * advantage).sum()
    assert torch.allclose(result.loss, expected, rtol=1e-9, atol=1e-12)
    (mine,) = torch.autograd.grad(result.loss, new)
    (theirs,) = torch.autograd.grad(expected, new)
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_supports_agree_where_the_ids_coincide():
    old, new, target, advantage = policies(12, 0.3)
    own, kept = objective(k=V, delta=0.0), objective(k=V, delta=0.0, support="old")
    first = own.loss(batch(own, old, new, target, advantage))
    second = kept.loss(batch(kept, old, new, target, advantage))
    assert torch.allclose(first.loss, second.loss, rtol=1e-9, atol=1e-10)
    (mine,) = torch.autograd.grad(first.loss, new)
    (theirs,) = torch.autograd.grad(second.loss, new)
    assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("support", ["own", "old"])
def test_token_that_the_new_policy_forbids(support):
    """It has p_d, whatever was projected, and no gradient of its own; counted."""
    old, new, target, advantage = policies(3, 0.1)
    with torch.no_grad():
        new[0, target[0]] = float("-inf")
    method = objective(support=support, alpha=0.0, bound=1e6)
    result = method.loss(batch(method, old, new, target, advantage))
    assert result.per_token["sampled_impossible"].tolist() == [1, 0, 0]
    assert result.per_token["ratio"][0] < 1e-3
    result.loss.backward()
    assert new.grad is not None
    assert new.grad.isfinite().all()
    assert new.grad[0].abs().max() < 1e-12


@pytest.mark.parametrize("rows", [0, 5])
def test_a_batch_without_weight_is_zero_on_the_graph(rows):
    old, new, target, advantage = policies(rows, 1.0)
    method = objective()
    inputs = batch(method, old, new, target, advantage)
    loss = method.loss(replace(inputs, weight=torch.zeros(rows, dtype=torch.float64))).loss
    assert loss.item() == 0
    loss.backward()
    assert new.grad is not None
    assert (new.grad == 0).all()


def test_one_kept_token_has_no_gradient():
    old, new, target, advantage = policies(1, 0.0)
    with torch.no_grad():
        old[:] = new[:] = -10.0
        old[0, target] = new[0, target] = 20.0
    method = objective()
    result = method.loss(batch(method, old, new, target, advantage))
    assert result.per_token["one_token_support"].tolist() == [1]
    result.loss.backward()
    assert new.grad is not None
    assert (new.grad == 0).all()


def test_a_kept_token_rarer_than_a_default_one_is_counted():
    """delta 0 keeps k tokens however rare they are."""
    old, new, target, advantage = policies(3, 0.1)
    with torch.no_grad():
        old[1, :] = -20.0
        old[1, target[1]] = 10.0
    method = objective(delta=0.0, p_d=1e-12)
    result = method.loss(batch(method, old, new, target, advantage))
    assert result.per_token["kept_below_default"].tolist() == [0, 1, 0]


def test_diagnostics_are_declared_detached_and_right():
    old, new, target, advantage = policies(30, 1.0)
    method = objective(bound=0.05)
    inputs = batch(method, old, new, target, advantage)
    per_token = method.loss(inputs).per_token
    assert per_token.keys() <= method.diagnostics.keys()
    assert all(values.shape == (30,) and not values.requires_grad for values in per_token.values())
    old_topk, new_topk = inputs.old.topk, inputs.new.topk
    assert old_topk is not None
    assert new_topk is not None
    sets = [
        (set(a[:n].tolist()), set(b[:m].tolist()))
        for a, n, b, m in zip(old_topk.ids, old_topk.count, new_topk.ids, new_topk.count)
    ]
    assert per_token["kept_old"].tolist() == [len(a) for a, _ in sets]
    assert per_token["kept_new"].tolist() == [len(b) for _, b in sets]
    jaccard = torch.tensor([len(a & b) / len(a | b) for a, b in sets], dtype=torch.float64)
    assert torch.allclose(per_token["support_jaccard"], jaccard)
    p = old.softmax(1)
    covered = torch.stack([p[i, list(a)].sum() for i, (a, _) in enumerate(sets)])
    assert torch.allclose(per_token["covered_old"], covered)
    ranked = old.argsort(1, descending=True)[:, :K]
    top_mass = p.gather(1, ranked).sum(1)
    assert per_token["k_bound_old"].tolist() == (top_mass < 1 - DELTA).double().tolist()
    projected = per_token["kl_before"] > 0.05
    assert torch.equal(per_token["projected"].bool(), projected)
    assert torch.equal(per_token["kl_before_projected"].isnan(), ~projected)
    assert (per_token["kl_after"] <= 0.05 * (1 + 1e-4)).all()


def test_old_record_of_another_cut_is_recut():
    """A wider record, from the engine for one, gives what selection with (k, delta) gives."""
    old, _, target, _ = policies(50, 0.0)
    method = objective()
    wide = HeadOutputs(None, topk_record(old, target, 15, 0.0), None)
    cut, direct = method.prepare_old(wide).topk, topk_record(old, target, K, DELTA)
    assert cut is not None
    assert torch.equal(cut.ids, direct.ids)
    assert torch.equal(cut.logits, direct.logits)
    assert torch.equal(cut.place, direct.place)
    again = method.prepare_old(HeadOutputs(None, cut, None)).topk
    assert again is not None
    assert torch.equal(again.ids, cut.ids)


def test_old_records_that_keep_too_little_are_refused():
    old, _, target, _ = policies(50, 0.0)
    with pytest.raises(ValueError, match="keeps the top 3 tokens; k=6"):
        objective().prepare_old(HeadOutputs(None, topk_record(old, target, 3, 0.0), None))
    with pytest.raises(ValueError, match=r"keeps fewer tokens .* positions, the first: \["):
        objective().prepare_old(HeadOutputs(None, topk_record(old, target, K, 0.5), None))
    with pytest.raises(ValueError, match="the old policy's top-K record; none was given"):
        objective().prepare_old(HeadOutputs(torch.zeros(50), None, None))


def test_sampled_token_impossible_under_the_old_policy_is_refused():
    old, _, target, _ = policies(4, 0.0)
    old[2, target[2]] = float("-inf")
    with pytest.raises(ValueError, match=r"-inf: corrupt data at 1 of 4 positions, the first: \[2\]"):
        objective().prepare_old(HeadOutputs(None, topk_record(old, target, K, DELTA), None))


def test_p_d_is_checked_against_the_vocabulary():
    objective(p_d=1e-12).check(151_936)
    with pytest.raises(ValueError, match="lower p_d"):
        objective(p_d=1e-5).check(151_936)
    with pytest.warns(UserWarning, match="default tokens may hold"):
        objective(p_d=1e-7, delta=1e-5).check(151_936)


def test_ratio_is_clamped():
    old, new, target, advantage = policies(1, 0.0)
    with torch.no_grad():
        new[0, target] = -500.0
    method = objective(bound=1e9, alpha=0.0, k=V, delta=0.0)
    result = method.loss(batch(method, old, new, target, advantage))
    assert result.per_token["ratio"].item() == pytest.approx(math.exp(-20))
