"""DPPO: a token is masked by the divergence of its distribution, not by its ratio (arXiv 2602.04879;
ALGORITHMS 6.1)."""

from pydantic import Field
from torch import Tensor

from megatron_troll.config import NonNegative
from megatron_troll.objectives.divergence import Divergence
from megatron_troll.objectives.masking import Masking, outward
from megatron_troll.objectives.slots import Statistics, Term
from megatron_troll.types import ObjectiveInputs

DELTA = {"tv": 0.15, "kl": 0.05}


class Dppo(Masking):
    """M_t = 0 if D_t > delta and the update moves the token further out: A > 0 and rho > 1, or A <= 0 and
    rho < 1. Defaults are those of the authors' code, which uses the binary divergence."""

    divergence: Divergence = Field(
        default="binary_tv", description="of {sampled token, rest} or of the top-K and the rest"
    )
    delta: NonNegative = Field(
        default_factory=lambda data: DELTA[data["divergence"][-2:]],
        description="largest divergence that an outward update may have; 0.15 for TV, 0.05 for KL",
    )

    def gate(
        self, divergence: Tensor, log_rho: Tensor, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        rejected = (divergence > self.delta) & outward(log_rho, inputs.advantage)
        return Term((~rejected).to(divergence.dtype))
