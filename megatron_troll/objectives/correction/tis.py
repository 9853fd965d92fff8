"""Truncated importance sampling between rollout engine and trainer (Yao and others, "Your Efficient RL
Framework Secretly Brings You Off-Policy RL Training", 2025; ALGORITHMS 6.5)."""

from typing import ClassVar

from pydantic import Field

from megatron_troll.config import Pairing, PositiveFloat
from megatron_troll.objectives.mismatch import DIAGNOSTICS, OF_OLD_OVER_ROLLOUT, described, old_over_rollout
from megatron_troll.objectives.slots import Correction, Diagnostics, Policy, Statistics, Term
from megatron_troll.types import HeadRequest, ObjectiveInputs


class Tis(Correction):
    """C_t = min(old(o_t) / rollout(o_t), cap), detached. cap 2 is the default in verl and miles."""

    family: ClassVar[str] = "weight"

    cap: PositiveFloat = Field(default=2.0, description="largest weight")

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        return (OF_OLD_OVER_ROLLOUT,)

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(logp=True)

    @property
    def diagnostics(self) -> Diagnostics:
        return {**DIAGNOSTICS, "tis_truncated": ("mean",)}

    def weight(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        ratio = old_over_rollout(inputs)
        truncated = (ratio > self.cap).to(ratio.dtype)
        return described(ratio.clamp(max=self.cap), {"tis_truncated": truncated})
