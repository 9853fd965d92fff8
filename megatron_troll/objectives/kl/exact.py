"""The KL over the full vocabulary: the Rao-Blackwell estimator (arXiv 2504.10637; ALGORITHMS 3, 7)."""

from megatron_troll.config import ConfigError
from megatron_troll.objectives.reference import ReferenceKl
from megatron_troll.objectives.slots import Diagnostics, Policy, Statistics, Term
from megatron_troll.types import HeadRequest, ObjectiveInputs


class ExactKl(ReferenceKl):
    """K_t = KL(new || reference) at the position of token t, whatever token was sampled there. The
    head computes it while it holds both full rows, N x V."""

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(reference_kl=True)

    @property
    def reads_reference(self) -> HeadRequest:
        return HeadRequest(reference_kl=True)

    @property
    def diagnostics(self) -> Diagnostics:
        return {"reference_kl": ("mean", "max", "min")}

    def penalty(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        value = inputs.new.reference_kl
        if value is None:
            raise ConfigError(
                "objective.kl exact reads KL(new || reference) from the head, and none was given: "
                "set models.reference"
            )
        return Term(self.beta * value, {"reference_kl": value.detach()})
