from collections.abc import Mapping
from typing import Any

import torch

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import compose, token_weights
from megatron_troll.types import HeadOutputs
from tests.unit.golden.records import floats, one_response
from tests.unit.golden.runner import Runner


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    clip = {"name": "clip", "eps_low": case["eps_low"], "eps_high": case["eps_high"]}
    objective = compose(ObjectiveConfig(ratio=Slot(name="gspo"), trust_region=Slot.model_validate(clip)))
    logp = floats(case["log_ratio_tokens"], dtype).requires_grad_()
    length = case["length"]
    advantage = torch.full_like(logp.detach(), case["advantage"])
    weight = torch.full_like(advantage, token_weights([length], "seq-mean-token-mean")[0])
    old = HeadOutputs(torch.zeros_like(advantage), None, None)
    terms = objective.loss(one_response(HeadOutputs(logp, None, None), old, advantage, weight))
    (gradient,) = torch.autograd.grad(terms.loss, logp)
    ratio = terms.per_token["ratio"]
    return {
        "s": float(ratio[0]) if length else 1.0,
        "value": -float(terms.loss),
        "grad_coef_logp_per_token": (-gradient).tolist(),
        "gspo_token_ratio_value": ratio.tolist(),
        "is_clipped": bool(terms.per_token["clipped"].any()),
        "seq_contributes": length > 0,
    }


RUNNER = Runner(
    run,
    inputs=frozenset({"log_ratio_tokens", "length", "advantage", "eps_low", "eps_high"}),
    gradients=frozenset({"grad_coef_logp_per_token"}),
)
