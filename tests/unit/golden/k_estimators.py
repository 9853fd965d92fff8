from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_troll.objectives.kl.k1 import K1
from megatron_troll.objectives.kl.k2 import K2
from megatron_troll.objectives.kl.k3 import K3
from megatron_troll.objectives.reference import partial_kl
from megatron_troll.objectives.sampled_kl import SampledKl
from megatron_troll.objectives.slots import Policy, Term
from megatron_troll.types import HeadOutputs
from tests.unit.golden.records import floats, inputs_of
from tests.unit.golden.runner import Runner

METHODS: dict[str, type[SampledKl]] = {"k1": K1, "k2": K2, "k3": K3}


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    logits = floats(case["logits"], dtype).requires_grad_()
    new, token = logits.log_softmax(0), case["token"]
    old, ref = (floats(case[name], dtype).log_softmax(0) for name in ("old_logits", "ref_logits"))
    fields: dict[str, Any] = {"coef_of_grad_logp": {}}
    for name, method in METHODS.items():
        term = _penalty(method, new, old, ref)
        value = term.value[token]
        fields[name] = float(value)
        fields[f"grad_{name}"] = torch.autograd.grad(value, logits, retain_graph=True)[0].tolist()
        coefficient = torch.autograd.grad(value, new, retain_graph=True)[0][token]
        fields["coef_of_grad_logp"][name] = float(coefficient)
        fields[f"expected_{name}_on_policy"] = float((new.exp() * term.value).sum())
    weighted = _penalty(K3, new, old, ref, is_weight="token")
    whole = torch.ones_like(new, dtype=torch.bool)[None]
    return fields | {
        "is_ratio": float(weighted.per_token["reference_kl_ratio"][token]),
        "k3_times_is": float(weighted.value[token]),
        "full_kl": float(partial_kl(new[None], ref[None], whole, non_negative=False)),
    }


def _penalty(method: type[SampledKl], new: Tensor, old: Tensor, ref: Tensor, **fields: Any) -> Term:
    """One position for each token that might have been drawn."""
    one = torch.ones_like(old)
    readings = [HeadOutputs(logp, None, None) for logp in (new, old, ref)]
    inputs = inputs_of(readings[0], readings[1], one, one)
    inputs = type(inputs)(**{**vars(inputs), "reference": readings[2]})
    return method(beta=1.0, clamp=False, **fields).penalty(inputs, Policy(one, one, one), None)


RUNNER = Runner(
    run,
    inputs=frozenset({"V", "token", "logits", "ref_logits", "old_logits"}),
    gradients=frozenset({"grad_k1", "grad_k2", "grad_k3"}),
)
