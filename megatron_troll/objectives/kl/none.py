"""No reference penalty."""

from torch import zeros_like

from megatron_troll.objectives.slots import Kl, Policy, Statistics, Term
from megatron_troll.types import ObjectiveInputs


class NoKl(Kl):
    def penalty(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        return Term(zeros_like(inputs.advantage))
