"""PPO clipping (arXiv 1707.06347, eq. 7; asymmetric as in DAPO, arXiv 2503.14476; ALGORITHMS 6.6)."""

from pydantic import Field
from torch import Tensor, where

from megatron_troll.config import Fraction, NonNegative
from megatron_troll.objectives.slots import Diagnostics, Policy, Ratio, Statistics, Term, TrustRegion
from megatron_troll.types import ObjectiveInputs

# Bounds larger or smaller than those of the ratio by this factor are remarked on.
FAR = 20.0


class Clip(TrustRegion):
    """score = min(r A, clip(r, 1 - eps_low, 1 + eps_high) A).

    For A >= 0 that is min(r, 1 + eps_high) A, otherwise max(r, 1 - eps_low) A. No gradient strictly
    beyond the bound. The bounds that are not set are those of the ratio (`Ratio.clip`).
    """

    eps_low: Fraction = Field(
        default=0.2,
        description="how far below 1 the ratio counts; 1: no lower bound; default with gspo and dfpo: 3e-4",
    )
    eps_high: NonNegative = Field(
        default=0.2, description="how far above 1 the ratio counts; default with gspo and dfpo: 4e-4"
    )

    @classmethod
    def defaults(cls, ratio: Ratio) -> dict[str, object]:
        return dict(zip(("eps_low", "eps_high"), ratio.clip))

    def remarks(self, ratio: Ratio) -> tuple[str, ...]:
        usual = ratio.clip[1]
        if usual / FAR <= self.eps_high <= usual * FAR:
            return ()
        said = f"clip: eps_low={self.eps_low}, eps_high={self.eps_high} are not on the scale of this ratio"
        return (f"{said}, whose defaults are {ratio.clip[0]}, {usual}",)

    @property
    def diagnostics(self) -> Diagnostics:
        return {"clipped": ("mean",), "clipped_above": ("mean",), "clipped_below": ("mean",)}

    def limit(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        above, below = ratio.clamp(max=1.0 + self.eps_high), ratio.clamp(min=1.0 - self.eps_low)
        return where(advantage >= 0, above, below)

    def surrogate(
        self, ratio: Tensor, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        limited = self.limit(ratio, inputs.advantage)
        above, below = (limited < ratio) & (inputs.advantage != 0), limited > ratio
        parts = {"clipped": above | below, "clipped_above": above, "clipped_below": below}
        return Term(limited, {name: part.to(ratio.dtype) for name, part in parts.items()})
