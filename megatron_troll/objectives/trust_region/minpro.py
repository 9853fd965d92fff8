"""MinPRO: a stable stand-in for the product of prefix ratios (arXiv 2601.22718; ALGORITHMS 6.4)."""

from typing import ClassVar

from pydantic import Field
from torch import Tensor, minimum

from megatron_troll.config import NonNegative, Pairing
from megatron_troll.objectives.budget import before, scan
from megatron_troll.objectives.slots import Diagnostics, Policy, Statistics, Term, TrustRegion
from megatron_troll.types import ObjectiveInputs


class MinPro(TrustRegion):
    """score = sg(min(r_t min_{i<t} r_i, 1 + eps_high)) A log pi(o); the minimum over no tokens is 1.

    Reconstructed from the abstract: the paper's own formula and its upper clip are not confirmed. The clip
    is CISPO's.
    """

    family: ClassVar[str] = "weight"

    eps_high: NonNegative = Field(default=5.0, description="how far above 1 the weight counts")

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        return (
            Pairing(
                "ratio", ("response",), "it weighs each token by the ratios of that token and those before it"
            ),
        )

    @property
    def diagnostics(self) -> Diagnostics:
        return {"clipped": ("mean",), "prefix_minimum": ("mean", "min")}

    def surrogate(
        self, ratio: Tensor, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        segments, free = inputs.segments, ratio.detach()
        lowest = scan(segments.whole(free), segments.owner, minimum)
        prefix = segments.mine(before(lowest, segments.owner, 1.0))
        weight = free * prefix
        limited = weight.clamp(max=1.0 + self.eps_high)
        per_token = {"clipped": (limited != weight).to(ratio.dtype), "prefix_minimum": prefix}
        return Term(limited * policy.logp, per_token, limited)
