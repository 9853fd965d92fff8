"""One objective: a method per slot, and the loss they make together (ALGORITHMS 7)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_troll.advantages import Advantage
from megatron_troll.objectives.slots import (
    Correction,
    Diagnostics,
    Kl,
    Method,
    Policy,
    Ratio,
    Statistics,
    TrustRegion,
)
from megatron_troll.types import LossTerms, ObjectiveInputs, Readings, Reads


@dataclass(frozen=True)
class Objective:
    """Pure tensor maths on the N tokens of a micro-batch; nothing here waits for the device but
    `prepare_old` and a method's own solver.

    reads      what the head must give of the current policy, with gradient
    reads_old  what must be known of the policy at the start of the update
    """

    advantage: Advantage
    ratio: Ratio
    trust_region: TrustRegion
    kl: Kl
    correction: Correction

    @property
    def methods(self) -> tuple[Method, ...]:
        return self.ratio, self.trust_region, self.kl, self.correction

    @property
    def reads(self) -> Reads:
        return merge_reads(tuple(method.reads for method in self.methods))

    @property
    def reads_old(self) -> Reads:
        return merge_reads(tuple(method.reads_old for method in self.methods))

    @property
    def diagnostics(self) -> Diagnostics:
        """Names that `LossTerms.per_token` may hold, with their reductions over the step. NaN entries do
        not count; a name is absent where its source (a logsumexp) is."""
        table: dict = {"objective": ("mean",), "approx_kl": ("mean", "max")}
        for method in self.methods:
            table |= method.diagnostics
        return table

    @property
    def needs_statistics(self) -> bool:
        return any(method.needs_statistics for method in self.methods)

    def check(self, vocab: int) -> None:
        """Raises ValueError where a method cannot work with a vocabulary of this size."""
        for method in self.methods:
            method.check(vocab)

    def prepare_old(self, old: Readings) -> Readings:
        """The old readings checked and cut to what this objective reads; once, before any update."""
        return self.trust_region.prepare_old(old)

    @torch.no_grad()
    def statistics(self, inputs: ObjectiveInputs) -> Statistics | None:
        """Sums over one micro-batch, to be added up over the optimizer step; None when no method asks."""
        if not self.needs_statistics:
            return None
        sums: Statistics = {}
        for method in self.methods:
            sums |= method.statistics(inputs)
        return sums

    def loss(self, inputs: ObjectiveInputs, statistics: Statistics | None = None) -> LossTerms:
        """-sum weight * J over the N tokens; statistics are those of the whole step."""
        policy = self.trust_region.policy(inputs, statistics)
        score = self.ratio.score(self.trust_region, policy, inputs, statistics)
        correction = self.correction.weight(inputs, policy, statistics)
        kl = self.kl.penalty(inputs, policy, statistics)
        objective = correction.value * score.value - policy.penalty - kl.value
        per_token = {"objective": objective.detach(), "approx_kl": approximate_kl(policy)}
        for term in (policy, score, correction, kl):
            per_token |= term.per_token
        return LossTerms(-(inputs.weight * objective).sum(), per_token)


def approximate_kl(policy: Policy) -> Tensor:
    """[N] estimate r - 1 - log r of KL(old || pi) from tokens drawn from old (k3)."""
    x = (policy.logp - policy.old).detach().clamp(-20.0, 20.0)
    return torch.expm1(x) - x


def merge_reads(parts: tuple[Reads, ...]) -> Reads:
    """Everything that any part reads. One record serves all, so two supports are refused."""
    supports = {part.topk for part in parts if part.topk is not None}
    if len(supports) > 1:
        raise ValueError(
            f"one objective reads one top-K record, not {len(supports)}: {sorted(map(str, supports))}"
        )
    return Reads(any(part.logp for part in parts), next(iter(supports), None))
