from collections.abc import Mapping
from typing import Any

import torch

from megatron_troll.objectives.trust_region.cppo import Cppo
from megatron_troll.types import HeadOutputs
from tests.unit.golden.records import floats, one_response
from tests.unit.golden.runner import Runner


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    divergence, rho, advantage = (floats(case[name], dtype) for name in ("D", "rho", "advantage"))
    nothing = HeadOutputs(None, None, None)
    inputs = one_response(nothing, nothing, advantage, torch.ones_like(advantage))
    method = Cppo(
        delta=case["delta"],
        delta_b=case["delta_b"],
        w_min=case["w_min"],
        t_ref=case["T_weight"] or None,
        weights="uniform" if case["uniform_weights"] else "schedule",
        use_budget=case["use_budget"],
    )
    accounts = method.accounts(divergence, inputs, case["delta_b"])
    gate = method.gate(divergence, rho.log(), inputs, None)
    threshold = accounts.threshold.to(dtype)
    return {
        "w": accounts.weight.tolist(),
        "S": accounts.spent.tolist(),
        "W": accounts.total.tolist(),
        "c": threshold.tolist(),
        "tv_threshold_on_D": (accounts.threshold / accounts.weight).tolist(),
        "I": ((accounts.weight * accounts.divergence).to(dtype) <= threshold).tolist(),
        "mask": gate.value.bool().tolist(),
        "mask_fraction": float((1.0 - gate.value).mean()) if len(rho) else 0.0,
    }


RUNNER = Runner(
    run,
    frozenset(
        {"T_weight", "delta", "delta_b", "w_min", "uniform_weights", "use_budget", "D", "rho", "advantage"}
    ),
)
