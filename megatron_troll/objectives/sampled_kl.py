"""Estimators of KL(new || reference) from only the sampled token (ALGORITHMS 3)."""

from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from megatron_troll.objectives.reference import ReferenceKl, reference_of
from megatron_troll.objectives.slots import (
    Diagnostics,
    Policy,
    Statistics,
    Term,
    importance_ratio,
    limited,
    logp_of,
)
from megatron_troll.types import HeadRequest, ObjectiveInputs

K3_LIMIT = 10.0


class SampledKl(ReferenceKl):
    """K_t = [r_t] k(x_t), x_t = log new(o_t) - log ref(o_t) over the full vocabulary.

    With `is_weight: token`, r_t = new(o_t) / old(o_t) corrects for tokens sampled from old. It is detached
    unless `diff_is`; k3 with both is DeepSeek-V3.2's estimator, whose gradient r_t x_t grad log new(o_t) is
    the true one of the reverse KL. The limits of `clamp` are verl's; a token beyond them has no gradient.
    """

    clamp: bool = Field(default=True, description="limit x to [-20, 20] and k3 to [0, 10]")
    is_weight: Literal["none", "token"] = Field(
        default="none", description="token: multiply by new(o_t) / old(o_t)"
    )
    diff_is: bool = Field(default=False, description="differentiate that ratio too")

    @model_validator(mode="after")
    def _ratio_is_there(self) -> Self:
        if self.diff_is and self.is_weight == "none":
            raise ValueError("diff_is: true needs is_weight: token")
        return self

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(logp=True)

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(logp=self.is_weight == "token")

    @property
    def diagnostics(self) -> Diagnostics:
        return {
            "reference_kl": ("mean", "max", "min"),
            "reference_kl_clamped": ("mean",),
            "reference_kl_ratio": ("mean", "max"),
        }

    @abstractmethod
    def estimate(self, x: Tensor) -> Tensor:
        """k(x) [N], whose derivative is the coefficient of grad log new(o_t)."""

    def of_log_ratio(self, x: Tensor) -> Tensor:
        """The estimate from log-ratios x of any shape, with the limits of `clamp`."""
        return self.estimate(self._counted(x))

    def _counted(self, x: Tensor) -> Tensor:
        return limited(x) if self.clamp else x

    def penalty(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        new = logp_of(inputs.new, "new")
        x = new - logp_of(reference_of(inputs), "reference")
        value = self.of_log_ratio(x)
        per_token = {"reference_kl_clamped": (self._counted(x) != x).to(x.dtype)}
        if self.is_weight == "token":
            weight = importance_ratio(new, logp_of(inputs.old, "old"))
            value = (weight if self.diff_is else weight.detach()) * value
            per_token["reference_kl_ratio"] = weight.detach()
        return Term(self.beta * value, {"reference_kl": value.detach()} | per_token)


def k3(x: Tensor, clamp: bool) -> Tensor:
    """e^-x - 1 + x >= 0."""
    value = (-x).expm1() + x
    return value.clamp(0.0, K3_LIMIT) if clamp else value
