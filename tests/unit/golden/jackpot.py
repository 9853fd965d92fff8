from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_troll.objectives.correction.jackpot import (
    Jackpot,
    accept_prob,
    importance,
    kl_of_sparse,
    log_accepted,
)
from megatron_troll.objectives.slots import Policy, Statistics
from megatron_troll.types import NO_ID, HeadOutputs, ObjectiveInputs, TopK
from tests.unit.golden.records import floats, inputs_of
from tests.unit.golden.runner import Runner

UNLIMITED = 1e30


def run(case: Mapping[str, Any], dtype: torch.dtype) -> Mapping[str, Any]:
    """Every row is a micro-batch of its own; their statistics are added up."""
    rows = [_Token(case, row, dtype) for row in case["rows"]]
    parts = [row.method.statistics(row.inputs) for row in rows]
    total = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    n, accept, overlap, *_ = total["jackpot_moments"].tolist()
    accepted = float(total["jackpot_accepted"].sum())
    by_count = total["jackpot_moments"].clone()
    by_count[1] = accepted  # the printed kappa, in place of the Rao-Blackwell one
    counted = {**total, "jackpot_moments": by_count}
    return {
        "alpha_hat_mask": accepted / n,
        "alpha_hat_rao_blackwell": accept / n,
        "mean_Z_approx": overlap / n,
        "kappa_mask": rows[0].weigh(counted)["jackpot_kappa"],
        "kappa_rao_blackwell": rows[0].weigh(total)["jackpot_kappa"],
        "rows": [row.fields(counted, total) for row in rows],
    }


class _Token:
    """One token, with the record of an engine that kept p_inf on all of V_k."""

    def __init__(self, case: Mapping[str, Any], row: Mapping[str, Any], dtype: torch.dtype):
        logits = (floats(row[f"p_{name}_logits"], dtype)[None] for name in ("inf", "new", "ref"))
        self.rollout, self.new, self.old = (values.log_softmax(1) for values in logits)
        self.target = self.new if case["target"] == "new" else self.old
        self.token, self.lam = row["token"], case["lam"]
        self.ids = torch.cat([_top(logp, case["k"]) for logp in (self.rollout, self.new)]).unique()
        self.method = Jackpot(
            target=case["target"], lam=self.lam, c1=case["c1"], c2=case["c2"], k=len(self.ids), clamp=False
        )
        self.inputs = self._inputs(self.ids, row["uniform"])

    def fields(self, counted: Statistics, total: Statistics) -> Mapping[str, Any]:
        drawn = self.weigh(total)
        unlimited = self.method.model_copy(update={"c1": UNLIMITED, "c2": UNLIMITED})
        post = log_accepted(self.target, self.rollout, self.lam)
        z = post.logsumexp(1, keepdim=True)
        post = post - z
        before, after = kl_of_sparse(self.target, self.rollout), kl_of_sparse(self.target, post)
        factor = importance(self.target, self.rollout, self.lam)[0]
        accept = accept_prob(self.target, self.rollout, self.lam)[0]
        anything = torch.arange(1.0, len(factor) + 1, dtype=factor.dtype).sin()
        p, q = self.target[0].exp(), self.rollout[0].exp()
        return {
            "a": accept.tolist(),
            "accept_prob": drawn["jackpot_accept_prob"],
            "accepted": int(drawn["jackpot_accepted"]),
            "Z": float(z.exp()),
            "post": post[0].exp().tolist(),
            "kl_target_inf": float(before),
            "kl_target_post": float(after),
            "kl_decrease": float(before - after),
            "topk_union": self.ids.tolist(),
            "Z_approx": drawn["jackpot_z_approx"],
            "w_obrs_exact_Z": float(z.exp() * factor[self.token]),
            "w_check_target_over_post": float((self.target - post)[0, self.token].exp()),
            "w_obrs_mask": self._weight(unlimited, counted, old=self.target),
            "w_obrs_rb": self._weight(unlimited, total, old=self.target),
            "rho_mask": self._weight(self.method, counted, old=self.old),
            "rho_rb": self._weight(self.method, total, old=self.old),
            "identity_lhs_minus_rhs": float((q * accept * factor * anything).sum() - (p * anything).sum()),
        }

    def weigh(self, statistics: Statistics) -> dict[str, float]:
        term = self.method.weight(self.inputs, _no_policy(), statistics)
        return {name: float(value) for name, value in term.per_token.items()}

    def _weight(self, method: Jackpot, statistics: Statistics, old: Tensor) -> float:
        """Of a token that is accepted, against this old policy."""
        inputs = self._inputs(self.ids, uniform=0.0)
        readings = replace(inputs.old, logp=old[:, self.token])
        return float(method.weight(replace(inputs, old=readings), _no_policy(), statistics).value)

    def _inputs(self, ids: Tensor, uniform: float) -> ObjectiveInputs:
        inside = bool((ids == self.token).any())
        slots = torch.cat((ids, torch.tensor([NO_ID if inside else self.token])))[None]
        place = (slots[0] == self.token).nonzero()[0]
        count = torch.tensor([len(ids) + (not inside)])
        at = lambda logp: logp.gather(1, slots.clamp(min=0)).masked_fill(slots == NO_ID, float("-inf"))  # noqa: E731
        one = self.new.new_ones(1)
        new, old = (
            HeadOutputs(logp[:, self.token], None, None, at_rollout=at(logp)) for logp in (self.new, self.old)
        )
        return replace(
            inputs_of(new, old, one, one),
            rollout_logp=self.rollout[:, self.token],
            rollout_topk=TopK(slots, at(self.rollout), count, place, 0 * one, self.new.shape[1]),
            uniform=uniform * one,
        )


def _top(logp: Tensor, k: int) -> Tensor:
    return logp[0].sort(descending=True, stable=True).indices[:k]


def _no_policy() -> Policy:
    nothing = torch.zeros(1)
    return Policy(nothing, nothing, nothing)


RUNNER = Runner(
    run,
    inputs=frozenset(
        {"V", "lam", "k", "c1", "c2", "target", "p_inf_logits", "p_new_logits", "p_ref_logits"}
        | {"token", "uniform"}
    ),
)
