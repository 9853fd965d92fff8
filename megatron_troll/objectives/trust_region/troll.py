"""TROLL: projection of the policy onto a KL ball around the old one (arXiv 2510.03817; ALGORITHMS 1)."""

from dataclasses import replace
from math import log
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, full_like, no_grad, where
from troll_kernels.project import Projection, project
from troll_kernels.sparsify import sparse_logp

from megatron_troll.config import Node, NonNegative, Positive
from megatron_troll.objectives import budget, support
from megatron_troll.objectives.budget import places
from megatron_troll.objectives.slots import (
    Diagnostics,
    Policy,
    Ratio,
    Statistics,
    TrustRegion,
    lengths,
    refuse_rows,
)
from megatron_troll.objectives.sparse import Sparse
from megatron_troll.types import HeadOutputs, HeadRequest, ObjectiveInputs, Support, TopK


class Budget(Node):
    """A bound from CPPO's budget: eps_t = max(c_t, 0) / w_t with D_t = KL(new'_t || old'_t) (ALGORITHMS 7).

    By default S accumulates the KL after projection, min(D_t, eps_t), so that the budget never runs out;
    `raw` accumulates D_t. Only the constants of CPPO's KL variant apply, although its KL has the other
    direction, KL(mu || pi). Inward and outward moves are projected in the same way.
    """

    from_: Literal["cppo"] = Field(alias="from", description="whose budget the bound comes from")
    delta: NonNegative = Field(default=budget.KL[0], description="largest weighted KL of one token, nats")
    delta_b: NonNegative = Field(
        default=budget.KL[1], description="budget that each token adds for those after it, nats"
    )
    w_min: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.8, description="weight of the last token; the first has 1"
    )
    t_ref: Positive | None = Field(
        default=None,
        description="tokens over which the weight falls to w_min; default: the response's length",
    )
    accumulate: Literal["projected", "raw"] = Field(
        default="projected", description="what a token spends: its KL after the projection, or before"
    )

    @property
    def remarks(self) -> tuple[str, ...]:
        """Notes on the KL that is bounded, and on delta and delta_b if they are CPPO's for TV."""
        found = ["the bound is CPPO's budget on KL(new || old); CPPO itself measures KL(mu || new)"]
        deltas, deltas_b = budget.OF_TV
        if self.delta in deltas and self.delta_b in deltas_b:
            found.append(
                f"bound: delta={self.delta}, delta_b={self.delta_b} are CPPO's constants for TV; "
                f"the bound is a KL, for which they are delta={budget.KL[0]}, delta_b={budget.KL[1]}"
            )
        return tuple(found)

    def bounds(self, kl: Tensor, inputs: ObjectiveInputs) -> Tensor:
        """eps [N] from KL(new' || old') [N], detached."""
        segments = inputs.segments
        owner, whole = segments.owner, segments.whole(kl)
        horizon = segments.whole(lengths(inputs)).double() if self.t_ref is None else self.t_ref
        weight = budget.schedule(places(owner), horizon, self.w_min)
        thresholds = budget.kept_thresholds if self.accumulate == "projected" else budget.raw_thresholds
        threshold = thresholds(whole, weight, owner, self.delta, self.delta_b)
        return segments.mine(threshold.clamp(min=0.0) / weight).to(kl.dtype)


class Troll(Sparse, TrustRegion):
    """J_t = pi_t(o_t) / old'_t(o_t) A_t - alpha KL(new'_t || sg(pi_t))   (eq. 5)

    new', old' are the sparse distributions of eq. 21, pi the projection of new' with
    KL(pi || old') <= bound. The gradient reaches only the logits of the support (ALGORITHMS 1.7).
    Defaults are the paper's (Table 3, App. A.4) except `support`: the paper reads the new policy at its
    own top-K (`own`), with which a change of rank at the K-th place looks like a large KL (ALGORITHMS 1.8).
    """

    bound: NonNegative | Budget = Field(
        default=0.05,
        description="radius of the KL ball per token, nats (0 pins the policy), or {from: cppo}: a budget",
    )
    alpha: NonNegative = Field(
        default=1.0, description="weight of the regression of new' onto its projection"
    )

    def remarks(self, ratio: Ratio) -> tuple[str, ...]:
        return self.bound.remarks if isinstance(self.bound, Budget) else ()

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(topk=Support("own", self.k, self.delta))

    @property
    def diagnostics(self) -> Diagnostics:
        return {**PROJECTION_DIAGNOSTICS, **support.DIAGNOSTICS, **OWN_DIAGNOSTICS}

    def prepare_old(self, old: HeadOutputs) -> HeadOutputs:
        """Refuses a sampled token that the old policy could not have sampled."""
        place = _topk(old, "old").place
        refuse_rows(place < 0, "the old policy gives the sampled token a logit of -inf: corrupt data")
        return old

    def policy(self, inputs: ObjectiveInputs, statistics: Statistics | None) -> Policy:
        old, new = _topk(inputs.old, "old"), _topk(inputs.new, "new")
        if self.support == "old":
            new = replace(new, ids=old.ids, count=old.count, place=old.place)
        bound = self._bound(old, new, inputs)
        projection = self._project(old, new, bound)
        # The sampled token is always in the old support, but not in the new one if its logit is -inf.
        at, kept_logp = old.place[:, None], self._logp(old)
        logp, old_logp = projection.old.gather(1, at)[:, 0], kept_logp.gather(1, at)[:, 0]
        per_token = _of_projection(projection) | support.compare(old, new, projection.outside)
        per_token |= support.describe(old, self.k, self.delta, "old")
        rarer = (kept_logp > float("-inf")) & (kept_logp < log(self.p_d))
        per_token |= {"bound": bound, "kept_below_default": rarer.any(1).to(kept_logp.dtype)}
        if self.support == "own":
            per_token |= support.describe(new, self.k, self.delta, "new")
        return Policy(logp, old_logp, self.alpha * projection.kl_new_pi, per_token)

    def _bound(self, old: TopK, new: TopK, inputs: ObjectiveInputs) -> Tensor:
        """[N] bound of each token's KL."""
        if not isinstance(self.bound, Budget):
            return full_like(old.logits[:, 0], self.bound)
        with no_grad():
            unlimited = full_like(old.logits[:, 0], float("inf"))
            return self.bound.bounds(self._project(old, new, unlimited).kl_before, inputs)

    def _project(self, old: TopK, new: TopK, bound: Tensor) -> Projection:
        return project(new.ids, self._logp(new), old.ids, self._logp(old), bound, old.vocab, self.p_d)

    def _logp(self, topk: TopK) -> Tensor:
        return sparse_logp(topk.logits, topk.count, topk.vocab, self.p_d)


OWN_DIAGNOSTICS: Diagnostics = {"bound": ("mean", "min"), "kept_below_default": ("mean",)}

PROJECTION_DIAGNOSTICS: Diagnostics = {
    "projected": ("mean",),
    "kl_before": ("mean", "p99", "max"),
    "kl_before_projected": ("mean", "p99", "max"),
    "kl_after": ("mean", "max"),
    "eta": ("p50", "p99", "max"),
    "tau": ("min",),
    "passes": ("mean", "max"),
    "unsolved": ("mean",),
    "regression_kl": ("mean",),
}


def _of_projection(projection: Projection) -> dict[str, Tensor]:
    tau, kl = projection.tau, projection.kl_before
    undefined = float("nan")
    return {
        "projected": projection.active.to(kl.dtype),
        "kl_before": kl,
        "kl_before_projected": where(projection.active, kl, undefined),
        "kl_after": projection.kl_after,
        "eta": where(tau > 0, (1.0 - tau) / tau, undefined),
        "tau": tau,
        "passes": projection.passes.to(kl.dtype),
        "unsolved": (~projection.solved).to(kl.dtype),
        "regression_kl": projection.kl_new_pi.detach(),
    }


def _topk(readings: HeadOutputs, side: str) -> TopK:
    if readings.topk is None:
        raise ValueError(f"troll reads the {side} policy's top-K record; none was given")
    return readings.topk
