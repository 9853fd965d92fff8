"""The entropy bonus, which is configured in addition to the slots: J_t += coef H_t (ALGORITHMS 7)."""

from abc import abstractmethod

from torch import Tensor
from troll_kernels.sparsify import sparse_logp

from megatron_troll.config import NonNegative
from megatron_troll.objectives.slots import Bonus
from megatron_troll.objectives.trust_region.troll import Troll
from megatron_troll.types import HeadRequest, ObjectiveInputs


class EntropyBonus(Bonus):
    coef: NonNegative

    def value(self, inputs: ObjectiveInputs) -> Tensor:
        """[N] coef H_t."""
        return self.coef * self._entropy(inputs)

    @abstractmethod
    def _entropy(self, inputs: ObjectiveInputs) -> Tensor: ...


class FullEntropy(EntropyBonus):
    """H of the new policy over the whole vocabulary."""

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(entropy=True)

    def _entropy(self, inputs: ObjectiveInputs) -> Tensor:
        if inputs.new.entropy is None:
            raise ValueError("the entropy bonus reads the new policy's entropy, and none was given")
        return inputs.new.entropy


class SparseEntropy(EntropyBonus):
    """H of new', the sparse policy of eq. 21 that TROLL projects: its gradient stays on the support.

    H = -sum_S p' log p' - (V - |S|) p_d log p_d
    """

    region: Troll

    @property
    def reads(self) -> HeadRequest:
        return self.region.reads

    @property
    def reads_old(self) -> HeadRequest:
        return self.region.reads_old

    def _entropy(self, inputs: ObjectiveInputs) -> Tensor:
        topk = inputs.new.topk
        if topk is None:
            raise ValueError("the sparse entropy bonus reads the new policy's top-K record; none was given")
        p_d = topk.logits.new_tensor(self.region.p_d)
        logp = sparse_logp(topk.logits, topk.count, topk.vocab, self.region.p_d)
        kept = logp > -float("inf")
        inside = logp.where(kept, 0.0)
        left_out = topk.vocab - kept.sum(1)
        return -(inside.exp() * inside).where(kept, 0.0).sum(1) - left_out * p_d * p_d.log()
