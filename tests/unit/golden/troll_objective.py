from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import compose, token_weights
from megatron_troll.types import HeadOutputs, LossTerms, TopK
from tests.unit.golden.records import floats, inputs_of, topk_record
from tests.unit.golden.runner import Runner

Token = Mapping[str, Any]


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """Tokens that share a bound go through the objective as one batch."""
    weights = token_weights(case["lens"], case["aggregation"], case.get("L_max"))
    tokens: dict[int, Mapping[str, Any]] = {}
    objective, projected = 0.0, 0.0
    for eps in {token["eps"] for token in case["tokens"]}:
        index = [i for i, token in enumerate(case["tokens"]) if token["eps"] == eps]
        batch = [case["tokens"][i] for i in index]
        weight = torch.tensor([weights[token["seq"]] for token in batch], dtype=dtype)
        fields, loss = _batch(case, batch, eps, weight)
        tokens |= dict(zip(index, fields))
        objective -= float(loss.loss)
        projected += float(loss.per_token["projected"].sum())
    return {
        "objective": objective,
        "projected_fraction": projected / len(case["tokens"]),
        "tokens": [tokens[i] for i in range(len(case["tokens"]))],
    }


def _batch(
    case: Mapping[str, Any], batch: list[Token], eps: float, weight: Tensor
) -> tuple[list[Mapping[str, Any]], LossTerms]:
    k, delta = case["K"], case["delta"]
    fields = {
        "bound": eps,
        "alpha": case["alpha"],
        "k": k,
        "delta": delta,
        "p_d": case["p_d"],
        "support": "own",
    }
    objective = compose(ObjectiveConfig(trust_region=Slot.model_validate({"name": "troll"} | fields)))
    target = torch.tensor([token["token"] for token in batch])
    old_logits = torch.stack([floats(token["old_logits"], weight.dtype) for token in batch])
    new_logits = torch.stack([floats(token["new_logits"], weight.dtype) for token in batch]).requires_grad_()
    old = objective.prepare_old(HeadOutputs(None, topk_record(old_logits, target, k, delta), None))
    new = topk_record(new_logits, target, k, delta)
    advantage = torch.tensor([token["advantage"] for token in batch], dtype=weight.dtype)
    loss = objective.loss(inputs_of(HeadOutputs(None, new, None), old, advantage, weight))
    loss.loss.backward()
    assert old.topk is not None
    assert new_logits.grad is not None
    gradient = -new_logits.grad / weight[:, None]
    return [_fields(i, old.topk, new, loss, gradient, weight) for i in range(len(batch))], loss


def _fields(
    i: int, old: TopK, new: TopK, loss: LossTerms, gradient: Tensor, weight: Tensor
) -> Mapping[str, Any]:
    per_token = {name: float(values[i]) for name, values in loss.per_token.items()}
    return {
        "old_ids": old.ids[i, : int(old.count[i])].sort().values.tolist(),
        "new_ids": new.ids[i, : int(new.count[i])].sort().values.tolist(),
        "active": bool(per_token["projected"]),
        "tau": per_token["tau"],
        "kl_before": per_token["kl_before"],
        "kl_after": per_token["kl_after"],
        "ratio": per_token["ratio"],
        "reg_kl_new_proj": per_token["regression_kl"],
        "token_objective": per_token["objective"],
        "weight": float(weight[i]),
        "grad_token_objective_wrt_new_logits": gradient[i].tolist(),
    }


RUNNER = Runner(
    run,
    inputs=frozenset(
        {"lens", "V", "K", "delta", "p_d", "alpha", "aggregation", "L_max"}
        | {"seq", "t", "token", "advantage", "eps", "old_logits", "new_logits"}
    ),
    gradients=frozenset({"grad_token_objective_wrt_new_logits"}),
)
