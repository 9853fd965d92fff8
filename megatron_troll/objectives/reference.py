"""Shared parts of the `kl` methods: a coefficient, and the frozen reference model (ALGORITHMS 3).

`partial_kl` is KL(new || reference) summed over a set S of kept tokens (ALGORITHMS 3.1). Nothing holds N x V.
"""

import torch
from pydantic import Field
from torch import Tensor

from megatron_troll.config import NonNegative
from megatron_troll.objectives.slots import Kl
from megatron_troll.types import HeadOutputs, HeadRequest, ObjectiveInputs


class ReferenceKl(Kl):
    """J_t -= beta K_t. The default beta is that of the TIKE paper (section 5), for every estimator."""

    beta: NonNegative = Field(default=0.001, description="weight of the penalty, per nat; 0 only reports it")

    @property
    def reads_reference(self) -> HeadRequest:
        """Readings needed of the reference model."""
        return HeadRequest(logp=True)


def reference_of(inputs: ObjectiveInputs) -> HeadOutputs:
    if inputs.reference is None:
        raise ValueError("objective.kl reads a reference model, and none was given: set models.reference")
    return inputs.reference


def partial_kl(logp: Tensor, reference: Tensor, kept: Tensor, non_negative: bool) -> Tensor:
    """sum_S pi log(pi / ref) [N], or with `non_negative` sum_S (pi log(pi / ref) - pi + ref).

    logp, reference [N, W] log-probabilities, reference finite on S; kept [N, W] bool. Both equal the KL if
    S is the whole vocabulary; otherwise the first can be negative. Differentiable in logp; a kept token with
    logp = -inf counts as pi = 0 and has no gradient.
    """
    inside = kept & (logp != float("-inf"))
    log_p = torch.where(inside, logp, 0.0)
    log_ref = torch.where(inside, reference, 0.0)
    p = torch.where(inside, log_p.exp(), 0.0)
    terms = p * (log_p - log_ref)
    if non_negative:
        terms = terms - p + torch.where(kept, reference, float("-inf")).exp()
    return terms.sum(1)
