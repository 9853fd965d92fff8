from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_troll.objectives import budget
from megatron_troll.objectives.trust_region.troll import Budget
from megatron_troll.types import HeadOutputs
from tests.unit.golden.records import floats, one_response
from tests.unit.golden.runner import Runner


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    raw = floats(case["D_raw"], dtype)
    weight = budget.schedule(torch.arange(len(raw)), case["T_weight"], case["w_min"])
    both = {name: _accumulate(name, case, raw, weight) for name in ("projected", "raw")}
    return {"w": weight.tolist()} | both


def _accumulate(name: str, case: Mapping[str, Any], raw: Tensor, weight: Tensor) -> Mapping[str, Any]:
    fields = {key: case[key] for key in ("delta", "delta_b", "w_min")}
    bound = Budget.model_validate(
        {"from": "cppo", "accumulate": name, "t_ref": case["T_weight"] or None} | fields
    )
    nothing = HeadOutputs(None, None, None)
    bounds = bound.bounds(raw, one_response(nothing, nothing, raw, torch.ones_like(raw)))
    left = torch.minimum(raw, bounds)
    spent = left if name == "projected" else raw
    return {
        "eps": bounds.tolist(),
        "D_post": left.tolist(),
        "S": (weight * spent).cumsum(0).tolist(),
        "active": (raw > bounds).tolist(),
    }


RUNNER = Runner(run, frozenset({"delta", "delta_b", "w_min", "T_weight", "D_raw"}))
