"""TIKE: the KL summed over the top-k tokens ("Efficient KL Divergence Estimation via Truncated Top-K
Integration"; ALGORITHMS 3.1)."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, where

from megatron_troll.config import Positive
from megatron_troll.objectives.records import at_sampled, first_slots, log_probs, record_of
from megatron_troll.objectives.reference import ReferenceKl, partial_kl, reference_of
from megatron_troll.objectives.slots import (
    Diagnostics,
    Policy,
    Statistics,
    Term,
    importance_ratio,
    logp_of,
)
from megatron_troll.types import HeadRequest, ObjectiveInputs, Support, TopK


@dataclass(frozen=True)
class LogpPair:
    """Log-probabilities [N, W] of both models at the ids of one record; kept [N, W]: the set S; inside [N]:
    whether the sampled token is in S; floored [N]: whether the reference was raised to the floor in S."""

    topk: TopK
    new: Tensor
    reference: Tensor
    kept: Tensor
    inside: Tensor
    floored: Tensor


class Tike(ReferenceKl):
    """K_t = r_t sum_{v in S} new(v) log(new(v) / ref(v)),   r_t = new(o_t) / old(o_t)   (eq. 6)

    S is the top-k of the new policy (paper), or of the old one with `support: old`; the choice of S is
    not differentiated. r_t is detached (eq. 17) unless `diff_is`. For a fixed prefix the sum does not depend
    on o_t, so that r_t has mean 1 and only adds variance: `is_weight: none` leaves it out.

    The paper's remark recommends adding o_t to S (`union_sampled`); off by default, because then the mean of
    K_t is neither the truncated nor the full KL. `tail: horvitz` adds [o_t not in S] r_t log(new / ref)(o_t),
    with its own ratio differentiated: an unbiased estimate of the full KL and of its gradient. A reference
    log-prob below `floor` counts as `floor`, and the share of positions with one is reported.
    """

    k: Positive = Field(default=16, description="tokens summed over")
    support: Literal["own", "old"] = Field(default="own", description="whose top-k: the new or the old one's")
    union_sampled: bool = Field(default=False, description="sum over the sampled token too")
    is_weight: Literal["none", "token"] = Field(
        default="token", description="token: multiply by new(o_t) / old(o_t)"
    )
    diff_is: bool = Field(default=False, description="differentiate that ratio too (eq. 6 to the letter)")
    tail: Literal["none", "horvitz"] = Field(
        default="none", description="horvitz: the sampled token stands for the tokens outside S"
    )
    non_negative: bool = Field(default=False, description="sum new log(new / ref) - new + ref, which is >= 0")
    floor: Annotated[float, Field(lt=0)] = Field(
        default=-30.0, description="lowest log-prob of the reference, nats"
    )

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.diff_is and self.is_weight == "none":
            raise ValueError("diff_is: true needs is_weight: token")
        if self.union_sampled and self.tail == "horvitz":
            raise ValueError("tail: horvitz needs union_sampled: false, or the tail is never sampled")
        return self

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(topk=Support(self.support, self.k, 0.0), full=True)

    @property
    def reads_old(self) -> HeadRequest:
        topk = Support("own", self.k, 0.0) if self.support == "old" else None
        return HeadRequest(logp=self._weighs, topk=topk)

    @property
    def reads_reference(self) -> HeadRequest:
        return HeadRequest(topk=self.reads.topk)

    @property
    def diagnostics(self) -> Diagnostics:
        return {
            "reference_kl": ("mean", "max", "min"),
            "reference_kl_negative": ("mean",),
            "reference_kl_mass": ("mean", "min"),
            "reference_kl_sampled_outside": ("mean",),
            "reference_kl_floored": ("mean",),
            "reference_kl_ratio": ("mean", "max"),
        }

    @property
    def _weighs(self) -> bool:
        return self.is_weight == "token" or self.tail == "horvitz"

    def penalty(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        sides = self._sides(inputs)
        value = partial_kl(sides.new, sides.reference, sides.kept, self.non_negative)
        per_token = _report(sides)
        if self._weighs:
            weight = importance_ratio(at_sampled(sides.new, sides.topk), logp_of(inputs.old, "old"))
            per_token["reference_kl_ratio"] = weight.detach()
            if self.is_weight == "token":
                value = (weight if self.diff_is else weight.detach()) * value
            if self.tail == "horvitz":
                value = value + weight * self._outside(sides)
        per_token["reference_kl"] = value.detach()
        per_token["reference_kl_negative"] = (value.detach() < 0).to(value.dtype)
        return Term(self.beta * value, per_token)

    def _sides(self, inputs: ObjectiveInputs) -> LogpPair:
        topk = record_of(inputs.new.topk, self.k, "new", "objective.kl")
        frozen = record_of(reference_of(inputs).topk, self.k, "reference", "objective.kl")
        reference = log_probs(frozen, "reference")
        kept = first_slots(topk, self.k, self.union_sampled)
        inside = (topk.place >= 0) & kept.gather(1, topk.place.clamp(min=0)[:, None])[:, 0]
        floored = (kept & (reference < self.floor)).any(1)
        return LogpPair(topk, log_probs(topk, "new"), reference.clamp(min=self.floor), kept, inside, floored)

    def _outside(self, sides: LogpPair) -> Tensor:
        """[N] term of the sampled token if it lies outside S, otherwise 0."""
        x = at_sampled(sides.new, sides.topk) - at_sampled(sides.reference, sides.topk)
        x = where(sides.inside | (sides.topk.place < 0), 0.0, x)
        return x + (-x).expm1() if self.non_negative else x


def _report(sides: LogpPair) -> dict[str, Tensor]:
    """Diagnostics without gradient: mass of S, whether the sampled token is outside it, use of the floor."""
    new = sides.new.detach()
    return {
        "reference_kl_mass": where(sides.kept, new, float("-inf")).exp().sum(1),
        "reference_kl_sampled_outside": (~sides.inside).to(new.dtype),
        "reference_kl_floored": sides.floored.to(new.dtype),
    }
