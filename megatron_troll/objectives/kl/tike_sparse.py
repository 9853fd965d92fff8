"""TIKE on sparse distributions, which keeps the gradient on the support (ALGORITHMS 1.7, 3.1)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor, full_like, int64, where
from troll_kernels.sparsify import sparse_logp

from megatron_troll.objectives.records import first_slots, record_of
from megatron_troll.objectives.reference import ReferenceKl, partial_kl, reference_of
from megatron_troll.objectives.slots import Diagnostics, Policy, Statistics, Term
from megatron_troll.objectives.sparse import Sparse
from megatron_troll.types import HeadRequest, ObjectiveInputs, Support


class TikeSparse(Sparse, ReferenceKl):
    """K_t = KL(new' || ref') >= 0, both built by eq. 21 of TROLL on the support S of the new record, the
    sampled token included; tokens outside S have p_d in both and add 0.

    The logsumexp cancels on both sides, so that the loss reads only the logits of S. The defaults are
    TROLL's, so that one record serves both methods. There is no importance weight: for a fixed prefix it
    would only add variance. A token whose new logit is -inf leaves S; a reference logit more than `-floor`
    below the largest of S is raised to that limit.
    """

    floor: Annotated[float, Field(lt=0)] = Field(
        default=-30.0, description="lowest reference logit under the largest of S, nats"
    )

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(topk=Support("own", self.k, self.delta) if self.support == "old" else None)

    @property
    def reads_reference(self) -> HeadRequest:
        return HeadRequest(topk=self.reads.topk)

    @property
    def diagnostics(self) -> Diagnostics:
        return {"reference_kl": ("mean", "max", "min"), "reference_kl_floored": ("mean",)}

    def penalty(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        topk = record_of(inputs.new.topk, self.k, "new", "objective.kl")
        kept = first_slots(topk, self.k, union_sampled=True) & (topk.logits.detach() != float("-inf"))
        new = self._sparse(topk.logits, kept, topk.vocab)
        frozen = record_of(reference_of(inputs).topk, self.k, "reference", "objective.kl")
        logits = where(kept, frozen.logits, float("-inf"))
        lowest = logits.amax(1, keepdim=True) + self.floor
        reference = self._sparse(logits.clamp(min=lowest), kept, topk.vocab)
        value = partial_kl(new, reference, kept, non_negative=False)
        floored = (kept & (logits < lowest)).any(1)
        per_token = {"reference_kl": value.detach(), "reference_kl_floored": floored.to(value.dtype)}
        return Term(self.beta * value, per_token)

    def _sparse(self, logits: Tensor, kept: Tensor, vocab: int) -> Tensor:
        """log p' [N, W] on the `kept` slots. They need not come first, so the count is the width W."""
        every = full_like(kept[:, 0], kept.shape[1], dtype=int64)
        return sparse_logp(where(kept, logits, float("-inf")), every, vocab, self.p_d)
