"""Jackpot: rollout tokens rejected so that the accepted ones follow the trainer's policy more closely
(arXiv 2602.06107, Alg. 1; ALGORITHMS 5).

Optimal budgeted rejection sampling: a token sampled from the proposal q is accepted with probability
min(1, p / (lam q)) for a target p; accepted tokens follow min(q, p / lam) / Z. All arguments are
log-probabilities; nothing here holds N x V unless it is passed in.
"""

import math
from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, where

from megatron_troll.config import Pairing, Positive, PositiveFloat
from megatron_troll.objectives import mismatch
from megatron_troll.objectives.mismatch import described
from megatron_troll.objectives.records import at_rollout_of, at_sampled, first_slots, log_probs, record_of
from megatron_troll.objectives.slots import (
    Correction,
    Diagnostics,
    Policy,
    Reduction,
    Statistics,
    Term,
    importance_ratio,
    logp_of,
    once,
)
from megatron_troll.types import HeadRequest, ObjectiveInputs, TopK

KEY = "objective.correction"
KAPPA_LIMITS = (0.5, 4.0)
MEAN: tuple[Reduction, ...] = ("mean",)
DIAGNOSTICS: Diagnostics = {
    **mismatch.DIAGNOSTICS,
    "jackpot_accept_prob": MEAN,
    "jackpot_accepted": MEAN,
    "jackpot_response_acceptance": ("mean", "p10"),
    "jackpot_z_approx": MEAN,
    "jackpot_z": MEAN,
    "jackpot_z_accept_correlation": MEAN,
    "jackpot_kappa": MEAN,
    "jackpot_kappa_clamped": MEAN,
    "jackpot_weight_truncated": MEAN,
    "jackpot_back_truncated": MEAN,
    "jackpot_kl_rollout": ("mean", "max"),
    "jackpot_kl_post": ("mean", "max"),
}


@dataclass(frozen=True)
class Trial:
    """Rejection of the rollout tokens, with target p and rollout policy q.

    target    [N] log p(o_t)
    old       [N] log old(o_t)
    accept    [N] probability that the token is accepted
    accepted  [N] 1 if it was accepted, else 0
    overlap   [N] Z_approx, sum of min(q, p / lam) over the rollout engine's top k
    """

    target: Tensor
    old: Tensor
    accept: Tensor
    accepted: Tensor
    overlap: Tensor


class Jackpot(Correction):
    """C_t = Mask_t min(w_t, c1) min(old(o_t) / p(o_t), c2),   w_t = Z_t max(lam, p(o_t) / q(o_t))

    Mask_t = [u_t < min(1, p(o_t) / (lam q(o_t)))] with a uniform u_t stored with the rollout, so that a
    replay rejects the same tokens; Z_t = min(1, kappa Z_approx). Everything is detached, and recomputed at
    each update if the target is the new policy.

    Our choices: terms of Z_approx whose q was not stored count as 0; kappa = mean accept_prob / mean Z_approx
    over all tokens of the optimizer step (Rao-Blackwellised: the paper's formula counts acceptances) corrects
    the mean, within [0.5, 4]; the paper prints no values of lam, c1, c2 and no min on Z_t, and Alg. 1 line 26
    omits the mask that its eq. 5 has. `denominator: accepted` divides the score by the accepted tokens: of
    the step (token-mean), or of each response (sequence aggregations; L_max shrinks in proportion).
    """

    target: Literal["new", "ref"] = Field(
        default="new",
        description="the distribution that accepted tokens should follow: the new policy, or the old one",
    )
    lam: PositiveFloat = Field(default=1.0, description="how much is rejected; towards 0: nothing")
    c1: PositiveFloat = Field(default=3.0, description="largest weight of an accepted token")
    c2: PositiveFloat = Field(default=3.0, description="largest old(o_t) / p(o_t)")
    k: Positive = Field(default=20, description="entries of the rollout engine's top-K that Z is summed over")
    use_z: bool = Field(default=True, description="weigh a position by its acceptance rate Z_t (eq. 5)")
    denominator: Literal["all", "accepted"] = Field(default="all", description="tokens the mean is over")
    clamp: bool = Field(default=True, description="keep kappa in [0.5, 4] and Z_t at most 1")

    @model_validator(mode="after")
    def _denominator_has_z(self) -> Self:
        if self.denominator == "accepted" and not self.use_z:
            raise ValueError("denominator: accepted is a mean over accepted tokens only with use_z: true")
        return self

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        reason = "it rejects single tokens, for which the pair is not defined"
        return (
            Pairing("ratio", ("response",), reason),
            Pairing("trust_region", ("mask", "weight", "symclip"), reason),
        )

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(at_rollout=self.target == "new")

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(logp=self.target == "new", at_rollout=self.target == "ref")

    @property
    def needs_statistics(self) -> bool:
        return True

    @property
    def diagnostics(self) -> Diagnostics:
        return DIAGNOSTICS

    @property
    def rollout_k(self) -> int:
        return self.k

    def statistics(self, inputs: ObjectiveInputs) -> Statistics:
        trial, counted = self._trial(inputs), (inputs.weight > 0).to(inputs.weight.dtype)
        of_response = inputs.segments.expand(inputs.rollout)
        none = counted.new_zeros(inputs.rollouts)
        return {
            "jackpot_moments": moments(trial.accept, trial.overlap, counted),
            "jackpot_accepted": none.index_add(0, of_response, trial.accepted * counted),
            "jackpot_tokens": none.index_add(0, of_response, counted),
        }

    def weight(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        if statistics is None:
            raise ValueError("jackpot needs its statistics of the whole optimizer step; none were given")
        trial = self._trial(inputs)
        kappa, clamped = self._kappa(statistics["jackpot_moments"])
        z = kappa.to(trial.overlap.dtype) * trial.overlap
        z = z.clamp(max=1.0) if self.clamp else z
        forth = importance(trial.target, inputs.rollout_logp, self.lam) * (z if self.use_z else 1.0)
        back = importance_ratio(trial.old, trial.target)
        rho = forth.clamp(max=self.c1) * back.clamp(max=self.c2)
        weight = trial.accepted * rho * self._denominator(inputs, statistics)
        share = statistics["jackpot_accepted"] / statistics["jackpot_tokens"]
        per_token = {
            "accept_prob": trial.accept,
            "accepted": trial.accepted,
            "response_acceptance": once(share[inputs.segments.expand(inputs.rollout)], inputs),
            "z_approx": trial.overlap,
            "z": z,
            "z_accept_correlation": correlation(statistics["jackpot_moments"]),
            "kappa": kappa,
            "kappa_clamped": clamped,
            "weight_truncated": forth > self.c1,
            "back_truncated": back > self.c2,
            **self._divergences(inputs, z),
        }
        return described(weight, {f"jackpot_{n}": v.to(z.dtype).expand_as(z) for n, v in per_token.items()})

    def _trial(self, inputs: ObjectiveInputs) -> Trial:
        record, slots = self._record(inputs), self._target(inputs)
        target = at_sampled(slots, record)
        old = target if self.target == "ref" else logp_of(inputs.old, "old")
        accept = accept_prob(target, inputs.rollout_logp, self.lam)
        kept = first_slots(record, self.k, union_sampled=False)
        accepted_law = log_accepted(slots, log_probs(record, "rollout"), self.lam).exp()
        overlap = where(kept, accepted_law, 0.0).sum(1)
        return Trial(target, old, accept, (inputs.uniform < accept).to(accept.dtype), overlap)

    def _record(self, inputs: ObjectiveInputs) -> TopK:
        return record_of(inputs.rollout_topk, self.k, "rollout", KEY)

    def _target(self, inputs: ObjectiveInputs) -> Tensor:
        """[N, W] log p at the ids of the rollout record."""
        side, readings = ("new", inputs.new) if self.target == "new" else ("old", inputs.old)
        return at_rollout_of(readings, side, KEY)

    def _kappa(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        """kappa, which calibrates Z_approx over the step, and whether it was clamped; scalars."""
        _, accept, overlap, *_ = moments
        kappa = accept / overlap.clamp(min=torch.finfo(overlap.dtype).tiny)
        limited = kappa.clamp(*KAPPA_LIMITS) if self.clamp else kappa
        return limited, limited != kappa

    def _denominator(self, inputs: ObjectiveInputs, statistics: Statistics) -> Tensor:
        """Factor that turns a mean over all tokens into one over accepted tokens; scalar or [N]."""
        if self.denominator == "all":
            return inputs.weight.new_ones(())
        if inputs.aggregation is None:
            raise ValueError("jackpot with denominator: accepted must know the aggregation; none was given")
        accepted, tokens = statistics["jackpot_accepted"], statistics["jackpot_tokens"]
        if inputs.aggregation != "token-mean":
            return (tokens / accepted.clamp(min=1.0))[inputs.segments.expand(inputs.rollout)]
        return tokens.sum() / accepted.sum().clamp(min=1.0)

    def _divergences(self, inputs: ObjectiveInputs, z: Tensor) -> dict[str, Tensor]:
        """[N] KL of the target to the rollout policy, and to the distribution of accepted tokens, both summed
        over the rollout engine's top k."""
        record = self._record(inputs)
        kept = first_slots(record, self.k, union_sampled=False)
        target = where(kept, self._target(inputs), float("-inf"))
        rollout = log_probs(record, "rollout")
        post = log_accepted(target, rollout, self.lam) - z.log()[:, None]
        return {"kl_rollout": kl_of_sparse(target, rollout), "kl_post": kl_of_sparse(target, post)}


def accept_prob(target: Tensor, proposal: Tensor, lam: float) -> Tensor:
    """min(1, p / (lam q)), elementwise."""
    return (target - proposal - math.log(lam)).clamp(max=0.0).exp()


def log_accepted(target: Tensor, proposal: Tensor, lam: float) -> Tensor:
    """log min(q, p / lam), elementwise: the distribution of accepted tokens before normalisation."""
    return torch.minimum(proposal, target - math.log(lam))


def importance(target: Tensor, proposal: Tensor, lam: float) -> Tensor:
    """max(lam, p / q), elementwise: p over the distribution of accepted tokens, without Z. The log-ratio is
    clamped to [-20, 20]."""
    return importance_ratio(target, proposal).clamp(min=lam)


def kl_of_sparse(target: Tensor, other: Tensor) -> Tensor:
    """sum_v p log(p / other) [N] over slots [N, W]; a slot with p = 0 adds 0."""
    return torch.where(target == float("-inf"), 0.0, target.exp() * (target - other)).sum(1)


def correlation(moments: Tensor) -> Tensor:
    """Pearson's coefficient from the sums [6] of 1, x, y, x^2, y^2 and x y. NaN if x or y is constant."""
    n, x, y, xx, yy, xy = moments.double()
    spread = (n * xx - x.square()).clamp(min=0.0) * (n * yy - y.square()).clamp(min=0.0)
    return ((n * xy - x * y) / spread.sqrt()).clamp(-1.0, 1.0)


def moments(x: Tensor, y: Tensor, counted: Tensor) -> Tensor:
    """The sums [6] for `correlation`, float64, of x [N] and y [N] over tokens with counted [N] = 1."""
    x, y, counted = x.double(), y.double(), counted.double()
    return torch.stack([torch.ones_like(x), x, y, x.square(), y.square(), x * y]) @ counted
