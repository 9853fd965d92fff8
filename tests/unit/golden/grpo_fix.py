from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import compose
from megatron_troll.types import HeadOutputs
from tests.unit.golden.records import floats, inputs_of
from tests.unit.golden.runner import Runner


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    if case.get("name") == "group_cancellation":
        return _cancellation(case, dtype)
    ratio = floats(case["ratio"], dtype)
    advantage = torch.full_like(ratio, case["advantage"])
    eps = case["eps"]
    value, clipped = _score({"name": "symclip", "eps": eps}, ratio, advantage)
    same, weighted = _score({"name": "symclip", "eps": eps, "grad": "weight"}, ratio, advantage)
    assert torch.equal(value, same)
    ppo = {"name": "clip", "eps_low": eps, "eps_high": eps}
    ppo_value, ppo_gradient = _score(ppo, ratio, advantage)
    phi, _ = _score({"name": "symclip", "eps": eps}, ratio, torch.ones_like(ratio))
    return {
        "phi": phi.tolist(),
        "value": value.tolist(),
        "grad_coef_logp_reading_A_autograd": clipped.tolist(),
        "grad_coef_logp_reading_B_weight": weighted.tolist(),
        "ppo_value": ppo_value.tolist(),
        "ppo_grad_coef_logp": ppo_gradient.tolist(),
    }


def _cancellation(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """The sum over A = -1 and 1 of PPO's value and of phi A at each ratio. The README names neither field
    but by what it holds."""
    ratio = floats(next(values for name, values in case.items() if "ratio" in name), dtype)
    signs = torch.tensor([-1.0, 1.0], dtype=dtype).tile(len(ratio))
    eps = case["eps"]
    slots = {
        "ppo": {"name": "clip", "eps_low": eps, "eps_high": eps},
        "phi": {"name": "symclip", "eps": eps},
    }
    sums = {
        word: _score(slot, ratio.repeat_interleave(2), signs)[0].view(-1, 2).sum(1).tolist()
        for word, slot in slots.items()
    }
    return {name: sums[word] for name in case for word in sums if word in name}


def _score(slot: dict[str, Any], ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Value of each token, and its derivative with respect to log pi."""
    objective = compose(ObjectiveConfig(trust_region=Slot.model_validate(slot)))
    old = torch.zeros_like(ratio)
    logp = ratio.log().requires_grad_()
    inputs = inputs_of(HeadOutputs(logp, None, None), HeadOutputs(old, None, None), advantage, old + 1.0)
    terms = objective.loss(inputs)
    (gradient,) = torch.autograd.grad(terms.loss, logp)
    return terms.per_token["objective"], -gradient


RUNNER = Runner(
    run,
    inputs=frozenset({"ratio", "ratios", "shared_ratio", "advantage", "advantages", "eps"}),
    gradients=frozenset(
        {"grad_coef_logp_reading_A_autograd", "grad_coef_logp_reading_B_weight", "ppo_grad_coef_logp"}
    ),
)
