"""GRPO-fix: one bound on the ratio for both signs of the advantage (arXiv 2604.13088; ALGORITHMS 4.3)."""

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from megatron_troll.config import NonNegative, Pairing
from megatron_troll.objectives.slots import Diagnostics, Policy, Statistics, Term, TrustRegion, unit
from megatron_troll.types import ObjectiveInputs


class SymClip(TrustRegion):
    """score = phi(r) A,  phi(r) = clip(r, 0, 1 + eps): opposite advantages at the same ratio cancel.

    `grad: clip` differentiates the clip (the paper's minimal change): gradient A r, and 0 above 1 + eps.
    `grad: weight` applies eq. 81 beyond its linear segment, with phi as a detached weight: gradient A phi(r)
    everywhere. The paper prints no eps; 0.2 is our choice. There is no lower bound: the gradient decays with
    r there. Cancellation over a group needs sum A = 0 and a normaliser that does not depend on the response.
    """

    family: ClassVar[str] = "symclip"

    eps: NonNegative = Field(default=0.2, description="how far above 1 the ratio counts, whatever the sign")
    grad: Literal["clip", "weight"] = Field(
        default="clip", description="clip: no gradient beyond the bound; weight: the bound as a weight"
    )

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        return (Pairing("ratio", ("response",), "its bound and its cancellation are those of token ratios"),)

    @property
    def diagnostics(self) -> Diagnostics:
        return {"clipped": ("mean",)}

    def limit(self, ratio: Tensor, advantage: Tensor) -> Tensor:
        return ratio.clamp(max=1.0 + self.eps)

    def surrogate(
        self, ratio: Tensor, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        limited = self.limit(ratio, inputs.advantage)
        value = limited if self.grad == "clip" else limited.detach() * unit(policy.logp)
        return Term(value, {"clipped": (limited != ratio).to(ratio.dtype)})
