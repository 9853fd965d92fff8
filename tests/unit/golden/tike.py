from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_troll.objectives.kl.tike import Tike
from megatron_troll.objectives.kl.tike_sparse import TikeSparse
from megatron_troll.objectives.records import first_slots
from megatron_troll.objectives.reference import partial_kl
from megatron_troll.objectives.slots import Kl, Policy, Term
from megatron_troll.types import NO_ID, HeadOutputs, ObjectiveInputs, TopK
from tests.unit.golden.records import floats, inputs_of, topk_record
from tests.unit.golden.runner import Runner

NO_GUARD = -1e30


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    new = floats(case["logits"], dtype)[None].requires_grad_()
    reference = floats(case["ref_logits"], dtype)[None]
    old = floats(case["old_logits"], dtype)[None]
    target = torch.tensor([case["token"]])
    record = topk_record(new, target, case["k"], 0.0)
    inputs = _inputs(record, reference, old, target)
    options = {"beta": 1.0, "k": case["k"], "union_sampled": case["union_sampled"], "floor": NO_GUARD}
    kept = first_slots(record, case["k"], case["union_sampled"])
    tike = _penalty(Tike(**options), inputs)
    differentiated = _penalty(Tike(diff_is=True, **options), inputs)
    plain = _penalty(Tike(is_weight="none", **options), inputs)
    generalised = _penalty(Tike(is_weight="none", non_negative=True, **options), inputs)
    ids = record.ids[kept].sort().values
    sparse_inputs = _inputs(_only(new, ids, target), reference, old, target)
    sparse = _penalty(
        TikeSparse(beta=1.0, k=len(ids), p_d=case["sparsified_p_d"], floor=NO_GUARD), sparse_inputs
    )
    logp, log_ref = new.log_softmax(1), reference.log_softmax(1)
    full = partial_kl(logp, log_ref, torch.ones_like(logp, dtype=torch.bool), non_negative=False)
    return {
        "set": ids.tolist(),
        "is_ratio": float(tike.per_token["reference_kl_ratio"]),
        "partial_kl": float(plain.value),
        "tike_value": float(tike.value),
        "grad_tike_sg_ratio": _gradient(tike, new),
        "grad_tike_ratio_differentiated": _gradient(differentiated, new),
        "full_kl": float(full),
        "tail_residual": float(full - plain.value),
        "mass_k": float(plain.per_token["reference_kl_mass"]),
        "sparsified_kl": float(sparse.value),
        "grad_sparsified_kl": _gradient(sparse, new),
        "generalised_partial_kl": float(generalised.value),
    }


def _inputs(record: TopK, reference: Tensor, old: Tensor, target: Tensor) -> ObjectiveInputs:
    at_ids = reference.gather(1, record.ids.clamp(min=0)).masked_fill(~record.valid, float("-inf"))
    ref = TopK(record.ids, at_ids, record.count, record.place, reference.logsumexp(1), record.vocab)
    one = old.new_ones(1)
    old_logp = old.log_softmax(1).gather(1, target[:, None])[:, 0]
    inputs = inputs_of(HeadOutputs(None, record, None), HeadOutputs(old_logp, None, None), one, one)
    return ObjectiveInputs(**{**vars(inputs), "reference": HeadOutputs(None, ref, None)})


def _only(logits: Tensor, ids: Tensor, target: Tensor) -> TopK:
    """The record that keeps exactly `ids`, whether the sampled token is among them or not."""
    slots = torch.cat((ids, ids.new_tensor([NO_ID])))[None]
    hit = (ids == target).nonzero()[:, 0]
    place = hit if len(hit) else torch.tensor([NO_ID])
    kept = logits.gather(1, slots.clamp(min=0)).masked_fill(slots == NO_ID, float("-inf"))
    return TopK(slots, kept, torch.tensor([len(ids)]), place, logits.logsumexp(1), logits.shape[1])


def _penalty(method: Kl, inputs: ObjectiveInputs) -> Term:
    one = inputs.advantage
    return method.penalty(inputs, Policy(one, one, one), None)


def _gradient(term: Term, logits: Tensor) -> list[float]:
    (gradient,) = torch.autograd.grad(term.value.sum(), logits, retain_graph=True)
    return gradient[0].tolist()


RUNNER = Runner(
    run,
    inputs=frozenset(
        {"V", "k", "token", "union_sampled", "logits", "ref_logits", "old_logits", "sparsified_p_d"}
    ),
    gradients=frozenset({"grad_tike_sg_ratio", "grad_tike_ratio_differentiated", "grad_sparsified_kl"}),
)
