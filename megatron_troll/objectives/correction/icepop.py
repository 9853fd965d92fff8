"""IcePop: tokens on which engine and trainer disagree are left out (Ring-1T, arXiv 2510.18855; ALGORITHMS
6.5; bounds of the NeMo-RL guide)."""

from typing import ClassVar, Self

from pydantic import Field, model_validator
from torch import where

from megatron_troll.config import NonNegative, Pairing, PositiveFloat
from megatron_troll.objectives.mismatch import DIAGNOSTICS, OF_OLD_OVER_ROLLOUT, described, old_over_rollout
from megatron_troll.objectives.slots import Correction, Diagnostics, Policy, Statistics, Term
from megatron_troll.types import HeadRequest, ObjectiveInputs


class IcePop(Correction):
    """C_t = r_t if alpha <= r_t <= beta, else 0;  r_t = old(o_t) / rollout(o_t), detached.

    The defaults are NeMo-RL's. Tokens that are left out still count in the denominator.
    """

    family: ClassVar[str] = "weight"

    alpha: NonNegative = Field(default=0.5, description="smallest ratio that passes")
    beta: PositiveFloat = Field(default=5.0, description="largest ratio that passes")

    @model_validator(mode="after")
    def _interval(self) -> Self:
        if self.alpha > self.beta:
            raise ValueError(f"alpha={self.alpha:g} must not exceed beta={self.beta:g}: nothing would pass")
        return self

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        return (OF_OLD_OVER_ROLLOUT,)

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(logp=True)

    @property
    def diagnostics(self) -> Diagnostics:
        return {**DIAGNOSTICS, "icepop_left_out": ("mean",)}

    def weight(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        ratio = old_over_rollout(inputs)
        passes = (ratio >= self.alpha) & (ratio <= self.beta)
        return described(where(passes, ratio, 0.0), {"icepop_left_out": (~passes).to(ratio.dtype)})
