from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_troll.advantages.dr_grpo import DrGrpo
from megatron_troll.advantages.grpo import Grpo
from megatron_troll.config import ObjectiveConfig, Slot
from megatron_troll.objectives import Objective, compose, transforms
from megatron_troll.objectives.ratio.dfpo import Dfpo, groups_of
from megatron_troll.types import HeadOutputs, ObjectiveInputs
from tests.unit.golden.records import floats, inputs_of
from tests.unit.golden.runner import Runner
from tests.unit.objectives.rows import segments

Case = Mapping[str, Any]
TRANSFORMS = {"min_replace": "min", "qp": "qp", "truncate": "truncate", "orth": "orth"}


def run(case: Case, dtype: torch.dtype) -> Mapping[str, Any]:
    return _group(case, dtype) if "log_ratio_tokens" in case else _note(case, dtype)


def _group(case: Case, dtype: torch.dtype) -> Mapping[str, Any]:
    rewards = torch.tensor(case["rewards"], dtype=dtype)
    advantage = Grpo()(rewards, torch.zeros_like(rewards, dtype=torch.int64))
    inputs = _inputs(case, advantage)
    plain = _objective(case, "dfpo", transform="min")
    statistics = plain.statistics(inputs)
    assert statistics is not None
    groups, region = groups_of(statistics), plain.trust_region
    a, s = groups.advantage, groups.log_s.exp()
    one = torch.ones_like(a)
    weights = {name: _method(case, name).weights(groups, groups.log_s, region) for name in TRANSFORMS}
    counted = weights["qp"][0]
    by_name = {"s_bar": counted} | {name: pair[1] for name, pair in weights.items()}
    return {
        "adv_std": float(rewards.std()),
        "advantage": advantage.tolist(),
        "s": s.tolist(),
        "clipped": region.limit(region.limit(s, one), -one).tolist(),
        "s_bar": counted.tolist(),
        "gspo_value": _gspo_value(case, inputs),
        "gspo_rewritten_value": float((counted * a).mean()),
        "gspo_grad_coef_logp_per_token": _coefficients(_objective(case, "gspo"), case, inputs),
        "min_replace": by_name["min_replace"].tolist(),
        "orth_proj_unconstrained": by_name["orth"].tolist(),
        "orth_proj_qp": by_name["qp"].tolist(),
        "qp_multiplier": float(transforms.multiplier(counted, a, groups.group, 1)[0]),
        "truncate_rebalance": by_name["truncate"].tolist(),
        "inner_product": {name: float((a * w).sum()) for name, w in by_name.items()},
        "asym": {name: float((a * w).var(correction=0)) for name, w in by_name.items()},
        "grad_coef_logp_per_token": {
            name: _coefficients(_objective(case, "dfpo", **_fields(case, name)), case, inputs)
            for name in TRANSFORMS
        },
    }


def _inputs(case: Case, advantage: Tensor) -> ObjectiveInputs:
    """Weights 1 / (T_i G), where G counts empty responses."""
    lengths = torch.tensor(case["lengths"])
    owner = torch.arange(len(lengths)).repeat_interleave(lengths)
    logp = floats([x for tokens in case["log_ratio_tokens"] for x in tokens], advantage.dtype)
    weight = 1.0 / (lengths[owner] * len(lengths)).to(advantage.dtype)
    new, old = (
        HeadOutputs(logp.requires_grad_(), None, None),
        HeadOutputs(torch.zeros_like(weight), None, None),
    )
    return replace(
        inputs_of(new, old, advantage[owner], weight),
        position=torch.cat([torch.arange(int(n)) for n in lengths]),
        segments=segments(owner, len(lengths)),
        group=torch.zeros_like(lengths),
        rollout=torch.arange(len(lengths)),
        rollouts=len(lengths),
        response_advantage=advantage,
    )


def _fields(case: Case, name: str) -> dict[str, Any]:
    return {"transform": TRANSFORMS[name], "allow_negative": name == "orth", "floor": case["truncate_eps"]}


def _method(case: Case, name: str) -> Dfpo:
    return Dfpo.model_validate(_fields(case, name))


def _objective(case: Case, ratio: str, **fields: Any) -> Objective:
    low, high = (case.get("clip_eps", case.get(name)) for name in ("eps_low", "eps_high"))
    # A bound below 0 is no bound: 5 only switches the clip off.
    clip = {"name": "clip", "eps_low": min(low, 1.0), "eps_high": high}
    return compose(
        ObjectiveConfig(
            ratio=Slot.model_validate({"name": ratio} | fields), trust_region=Slot.model_validate(clip)
        )
    )


def _coefficients(objective: Objective, case: Case, inputs: ObjectiveInputs) -> list[list[float]]:
    terms = objective.loss(inputs, objective.statistics(inputs))
    assert inputs.new.logp is not None
    (gradient,) = torch.autograd.grad(-terms.loss, inputs.new.logp)
    return [part.tolist() for part in gradient.split(case["lengths"])]


def _gspo_value(case: Case, inputs: ObjectiveInputs) -> float:
    """An empty response has no token that could carry its s = 1."""
    advantage = inputs.response_advantage
    assert advantage is not None
    empty = torch.tensor(case["lengths"]) == 0
    return -float(_objective(case, "gspo").loss(inputs).loss) + float(advantage[empty].sum() / len(empty))


def _note(case: Case, dtype: torch.dtype) -> Mapping[str, Any]:
    """The entries that are about one formula of the paper."""
    if "s_plus" in case:
        return _rebalancing(case, dtype)
    if "u" in case:
        a = floats(case["advantage"], dtype)
        return {"advantage": a.tolist(), "sum_A_u": float((a * floats(case["u"], dtype)).sum())}
    if "lambda1" in case:
        return _shared_prefix(case, dtype)
    if "delta_log_odds" in case:
        return _log_odds(case, dtype)
    return _normalisers(case, dtype)


def _rebalancing(case: Case, dtype: torch.dtype) -> Mapping[str, Any]:
    s, a = floats(case["s_plus"], dtype), floats(case["advantage"], dtype)
    one = torch.zeros_like(s, dtype=torch.int64)
    balanced = transforms.rebalanced(s, a, one, 1, 1e-6)
    beta = float((balanced / s)[(balanced / s).argmin()])
    return {
        "advantage": a.tolist(),
        "delta": float((a * s).sum()),
        "beta_corrected": beta,
        "beta_as_printed": -beta,
        "rebalanced": balanced.tolist(),
    }


def _shared_prefix(case: Case, dtype: torch.dtype) -> Mapping[str, Any]:
    prefix = case["rho1"] * case["rho2"]
    s = floats([prefix * case["lambda1"], prefix * case["lambda2"]], dtype)
    a = floats([-case["A"], case["A"]], dtype)
    arguments = s, a, torch.zeros(2, dtype=torch.int64), 1
    lowest = transforms.lowest(*arguments)
    return {
        "s": s.tolist(),
        "advantage": a.tolist(),
        "shared_prefix_coef_sequence_coupled": float((a * s).sum()),
        "check": case["A"] * prefix * (case["lambda2"] - case["lambda1"]),
        "shared_prefix_coef_token_factorised_t1": float(case["rho1"] * a.sum()),
        "min_replace": lowest.tolist(),
        "shared_prefix_coef_min_replace": float((lowest * a).sum()),
        "qp": transforms.nearest(*arguments).tolist(),
    }


def _log_odds(case: Case, dtype: torch.dtype) -> Mapping[str, Any]:
    """Eq. 41, between the second and the third response."""
    rewards = floats(case.get("rewards", case["advantage"]), dtype)
    a = DrGrpo()(rewards, torch.zeros_like(rewards, dtype=torch.int64))
    s2, s3 = (case[name] if name in case else case["s"][i] for name, i in (("s2", 1), ("s3", 2)))
    change = case["eta_c"] * (a[1] * s2 - a[2] * s3)
    return {"advantage": a.tolist(), "s": case.get("s"), "delta_log_odds": float(change)}


def _normalisers(case: Case, dtype: torch.dtype) -> Mapping[str, Any]:
    """What all responses' gradients on a shared prefix add up to, under two normalisers."""
    a, lengths = floats(case["advantage"], dtype), torch.tensor(case["lengths"])
    s = floats(case.get("s_bar", case.get("s")) or case["min_replace"], dtype)
    lowest = transforms.lowest(s, a, torch.zeros_like(lengths), 1)
    sums = {"_seq_mean": float((a * lowest / lengths).sum()), "_constant_norm": float((a * lowest).sum())}
    return {
        "advantage": a.tolist(),
        "s": s.tolist(),
        "s_bar": s.tolist(),
        "min_replace": lowest.tolist(),
    } | {name: total for name in case for end, total in sums.items() if name.endswith(end)}


RUNNER = Runner(
    run,
    inputs=frozenset(
        {"rewards", "log_ratio_tokens", "lengths", "clip_eps", "eps_low", "eps_high", "truncate_eps"}
        | {
            "cvxpy_max_abs_diff",
            "rho1",
            "rho2",
            "lambda1",
            "lambda2",
            "A",
            "u",
            "s_plus",
            "eta_c",
            "s2",
            "s3",
        }
    ),
    gradients=frozenset({"gspo_grad_coef_logp_per_token", "grad_coef_logp_per_token"}),
)
