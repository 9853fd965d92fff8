"""One objective: a method per slot, and the loss they make together (ALGORITHMS 7)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_troll.advantages import Advantage
from megatron_troll.objectives.asymmetry import pulls_of
from megatron_troll.objectives.energy import Energy
from megatron_troll.objectives.slots import (
    Bonus,
    Correction,
    Diagnostics,
    Kl,
    Method,
    Policy,
    Ratio,
    Statistics,
    TrustRegion,
    limited,
)
from megatron_troll.objectives.support import cut
from megatron_troll.types import HeadOutputs, HeadRequest, LossTerms, ObjectiveInputs, Support


@dataclass(frozen=True)
class Objective:
    """The methods of all slots: pure tensor maths on the N tokens of a micro-batch. Only methods whose
    docstring says so wait for the device.

    reads      readings of the current policy that the head must return, with gradient
    reads_old  readings needed of the policy at the start of the update
    """

    advantage: Advantage
    ratio: Ratio
    trust_region: TrustRegion
    kl: Kl
    correction: Correction
    entropy: Bonus | None = None
    energy: Energy | None = None

    @property
    def methods(self) -> tuple[Method, ...]:
        beside = (method for method in (self.entropy, self.energy) if method is not None)
        return (self.ratio, self.trust_region, self.kl, self.correction, *beside)

    @property
    def reads(self) -> HeadRequest:
        return merge_reads(tuple(method.reads for method in self.methods))

    @property
    def reads_old(self) -> HeadRequest:
        return merge_reads(tuple(method.reads_old for method in self.methods))

    @property
    def reads_reference(self) -> HeadRequest:
        return merge_reads(tuple(method.reads_reference for method in self.methods))

    @property
    def needs_reference(self) -> bool:
        return self.reads_reference != HeadRequest()

    @property
    def rollout_k(self) -> int:
        """Entries that the rollout engine's record of each token must have."""
        return max(method.rollout_k for method in self.methods)

    @property
    def reads_rollout_topk(self) -> bool:
        """Whether the rollout engine's record of a token's top-K is read."""
        return self.rollout_k > 0 or self.reads.at_rollout or self.reads_old.at_rollout

    @property
    def diagnostics(self) -> Diagnostics:
        """Names that `LossTerms.per_token` may hold, with their reductions over the step. NaN entries do
        not count; a name is absent if its source (a logsumexp) is missing."""
        table: dict = {"objective": ("mean",), "approx_kl": ("mean", "max")}
        for method in self.methods:
            table |= method.diagnostics
        return table

    @property
    def needs_statistics(self) -> bool:
        return any(method.needs_statistics for method in self.methods)

    def check(self, vocab: int) -> None:
        """Raises ConfigError if a method cannot work with a vocabulary of this size."""
        for method in self.methods:
            method.check(vocab)

    def check_old(self, old: HeadOutputs) -> HeadOutputs:
        """Check old readings made for `reads_old` and return them as the trust region uses them. Called once,
        before any update. Waits for the device. Raises ValueError that names the bad positions."""
        if self.reads_old.topk is not None and old.topk is None:
            raise ValueError("this objective reads the old policy's top-K record; none was given")
        return self.trust_region.prepare_old(old)

    def prepare_old(self, old: HeadOutputs) -> HeadOutputs:
        """Like `check_old`, for records that may keep more tokens than `reads_old` asks for, as a rollout
        engine's: cut them to what this objective reads. Raises ValueError if a record keeps fewer tokens."""
        old, reads = self.check_old(old), self.reads_old
        if reads.topk is None or old.topk is None:
            return old
        others = {kept: cut(old.others.get(kept, old.topk), kept.k, kept.delta) for kept in reads.others}
        return replace(old, topk=cut(old.topk, reads.topk.k, reads.topk.delta), others=others)

    @torch.no_grad()
    def statistics(self, inputs: ObjectiveInputs) -> Statistics | None:
        """Sums over one micro-batch, to be added up over the optimizer step; None if no method needs any."""
        if not self.needs_statistics:
            return None
        sums: Statistics = {}
        for method in self.methods:
            sums |= method.statistics(self._seen_by(method, inputs))
        if self.ratio.needs_statistics:
            policy = self.trust_region.policy(self._seen_by(self.trust_region, inputs), None)
            sums |= self.ratio.policy_statistics(policy, inputs)
        return sums

    def loss(self, inputs: ObjectiveInputs, statistics: Statistics | None = None) -> LossTerms:
        """-sum weight * J over the N tokens; `statistics` are sums over the whole step."""
        region = self._seen_by(self.trust_region, inputs)
        policy = self.trust_region.policy(region, statistics)
        score = self.ratio.score(self.trust_region, policy, region, statistics)
        correction = self.correction.weight(self._seen_by(self.correction, inputs), policy, statistics)
        kl = self.kl.penalty(self._seen_by(self.kl, inputs), policy, statistics)
        objective = correction.value * score.value - policy.penalty - kl.value
        if self.entropy is not None:
            objective = objective + self.entropy.value(self._seen_by(self.entropy, inputs))
        per_token = {"objective": objective.detach(), "approx_kl": approximate_kl(policy)}
        for term in (policy, score, correction, kl):
            per_token |= term.per_token
        total = (inputs.weight * objective).sum()
        if self.energy is not None:
            per_token |= self.energy.measure(total, policy.logp, inputs)
        if inputs.response_advantage is None or score.weight is None:
            return LossTerms(-total, per_token)
        return LossTerms(-total, per_token, pulls_of(score.weight, inputs))

    def _seen_by(self, method: Method, inputs: ObjectiveInputs) -> ObjectiveInputs:
        """The inputs, with the records that `method` asked for in their `topk` fields."""
        reads, reads_old = self.reads, self.reads_old
        if not (reads.others or reads_old.others):
            return inputs
        kept = method.reads.topk
        new = _seen(inputs.new, kept, reads.topk)
        old = _seen(inputs.old, method.reads_old.topk, reads_old.topk)
        reference = inputs.reference
        if reference is not None and method.reads_reference.topk is not None:
            reference = _seen(reference, kept, reads.topk)
        return replace(inputs, new=new, old=old, reference=reference)


def _seen(readings: HeadOutputs, kept: Support | None, first: Support | None) -> HeadOutputs:
    """The readings with the record of `kept` as `topk`; `first` is the support of the given `topk`."""
    if kept is None or kept == first:
        return readings
    if kept not in readings.others:
        raise ValueError(
            f"the head gave no record of {kept}, which this objective reads in addition to {first}"
        )
    return replace(readings, topk=readings.others[kept])


def approximate_kl(policy: Policy) -> Tensor:
    """[N] estimate r - 1 - log r of KL(old || pi) from tokens sampled from old (k3)."""
    x = limited(policy.logp - policy.old).detach()
    return torch.expm1(x) - x


def merge_reads(parts: tuple[HeadRequest, ...]) -> HeadRequest:
    """Everything that any part reads."""
    supports = tuple(dict.fromkeys(kept for part in parts for kept in part.supports))
    return HeadRequest(
        logp=any(part.logp for part in parts),
        topk=next(iter(supports), None),
        full=any(part.full for part in parts),
        at_rollout=any(part.at_rollout for part in parts),
        entropy=any(part.entropy for part in parts),
        reference_kl=any(part.reference_kl for part in parts),
        collision=any(part.collision for part in parts),
        others=supports[1:],
    )
