"""CISPO: the clipped ratio as a constant weight (arXiv 2506.13585; ALGORITHMS 6.3)."""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from megatron_troll.config import Fraction, NonNegative, Pairing
from megatron_troll.objectives.slots import Diagnostics, Policy, Statistics, Term, TrustRegion
from megatron_troll.types import ObjectiveInputs


class Cispo(TrustRegion):
    """score = sg(clip(r, 1 - eps_low, 1 + eps_high)) A log pi(o): a clipped token keeps its gradient.

    Aggregation must be token-mean. eps_high is tuned in every recipe; 5.0 is NeMo-RL's, 0.28 Trinity's.
    """

    family: ClassVar[str] = "weight"

    eps_low: Fraction = Field(default=1.0, description="how far below 1 the ratio counts; 1: no lower bound")
    eps_high: NonNegative = Field(default=5.0, description="how far above 1 the ratio counts")

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        return (
            Pairing("ratio", ("response",), "it weighs each token by the ratio of that token"),
            Pairing(
                "aggregation",
                ("seq-mean-token-mean", "seq-mean-token-sum-norm"),
                "its loss is a mean over the tokens of all responses",
            ),
        )

    @property
    def diagnostics(self) -> Diagnostics:
        return {"clipped": ("mean",)}

    def limit(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio.clamp(1.0 - self.eps_low, 1.0 + self.eps_high)

    def surrogate(
        self, ratio: Tensor, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        weight = self.limit(ratio, inputs.advantage).detach()
        clipped = (weight != ratio.detach()).to(ratio.dtype)
        return Term(weight * policy.logp, {"clipped": clipped}, weight)
