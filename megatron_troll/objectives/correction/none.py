"""The rollout policy is assumed to be the old policy."""

from torch import ones_like

from megatron_troll.objectives.slots import Correction, Policy, Statistics, Term
from megatron_troll.types import ObjectiveInputs


class NoCorrection(Correction):
    def weight(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        return Term(ones_like(inputs.advantage))
