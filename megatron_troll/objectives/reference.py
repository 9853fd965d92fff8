"""What the methods of slot `kl` share: a coefficient, and the frozen reference model (ALGORITHMS 3)."""

from pydantic import Field

from megatron_troll.config.tree import NonNegative
from megatron_troll.objectives.slots import Kl
from megatron_troll.types import ObjectiveInputs, Readings, Reads


class ReferenceKl(Kl):
    """J_t -= beta K_t. The default beta is that of the TIKE paper (section 5), for every estimator alike."""

    beta: NonNegative = Field(default=0.001, description="weight of the penalty, per nat; 0 only reports it")

    @property
    def reads_reference(self) -> Reads:
        """What must be known of the reference model."""
        return Reads(logp=True)


def reference_of(inputs: ObjectiveInputs) -> Readings:
    if inputs.reference is None:
        raise ValueError("objective.kl reads a reference model, and none was given: set models.reference")
    return inputs.reference
