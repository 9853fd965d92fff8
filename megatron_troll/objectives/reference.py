"""What the methods of slot `kl` share: a coefficient, and the frozen reference model (ALGORITHMS 3)."""

from pydantic import Field
from torch import Tensor

from megatron_troll.config.tree import NonNegative
from megatron_troll.objectives.slots import Kl
from megatron_troll.types import ObjectiveInputs, Readings, Reads, TopK


class ReferenceKl(Kl):
    """J_t -= beta K_t. The default beta is that of the TIKE paper (section 5), for every estimator alike."""

    beta: NonNegative = Field(default=0.001, description="weight of the penalty, per nat; 0 only reports it")

    @property
    def reads_reference(self) -> Reads:
        """What must be known of the reference model."""
        return Reads(logp=True)


def ratio(new: Tensor, old: Tensor) -> Tensor:
    """exp(new - old) [N]; the difference is clamped to [-20, 20] first, as in verl."""
    return (new - old).clamp(-20.0, 20.0).exp()


def reference_of(inputs: ObjectiveInputs) -> Readings:
    if inputs.reference is None:
        raise ValueError("objective.kl reads a reference model, and none was given: set models.reference")
    return inputs.reference


def topk_of(readings: Readings, side: str, k: int) -> TopK:
    """The record, which must keep k tokens beside the sampled one. Raises ValueError."""
    if readings.topk is None:
        raise ValueError(f"objective.kl reads the {side} policy's top-K record; none was given")
    kept = readings.topk.ids.shape[1] - 1
    if kept < min(k, readings.topk.vocab):
        raise ValueError(f"objective.kl.k: the {side} record keeps the top {kept} tokens, k={k} needs more")
    return readings.topk
