"""Cross-entropy on demonstrations: the warm start's loss, used in place of an objective."""

from dataclasses import dataclass

from megatron_troll.objectives.slots import Diagnostics, Statistics, logp_of
from megatron_troll.types import HeadOutputs, HeadRequest, LossTerms, ObjectiveInputs


@dataclass(frozen=True)
class Supervised:
    """loss = -sum_t weight_t log pi(o_t)."""

    needs_statistics: bool = False

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(logp=True)

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest()

    @property
    def diagnostics(self) -> Diagnostics:
        return {"objective": ("mean",)}

    def check_old(self, old: HeadOutputs) -> HeadOutputs:
        return old

    def prepare_old(self, old: HeadOutputs) -> HeadOutputs:
        return old

    def statistics(self, inputs: ObjectiveInputs) -> Statistics | None:
        return None

    def loss(self, inputs: ObjectiveInputs, statistics: Statistics | None = None) -> LossTerms:
        logp = logp_of(inputs.new, "new")
        return LossTerms(-(inputs.weight * logp).sum(), {"objective": logp.detach()})
