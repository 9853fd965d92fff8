"""Trust regions that mask the gradient of tokens at which the policy moved too far (ALGORITHMS 2, 6)."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from megatron_troll.config import Pairing, Positive, PositiveFloat
from megatron_troll.objectives.divergence import Divergence, binary, topk
from megatron_troll.objectives.records import at_rollout_of, first_slots, log_probs, record_of
from megatron_troll.objectives.slots import (
    Diagnostics,
    Policy,
    Statistics,
    Term,
    TrustRegion,
    by_decile,
    decile_diagnostics,
    limited,
)
from megatron_troll.types import HeadRequest, ObjectiveInputs, Support

KEY = "objective.trust_region"


class Masking(TrustRegion):
    """score = M_t sg(min(rho_t, cap)) A_t log pi(o_t),  rho_t = pi(o_t) / mu(o_t)

    M_t depends on the divergence D_t between mu and pi. A masked token has no gradient and still counts in
    the denominator. By default mu is the rollout policy that sampled the tokens, so that the score also
    corrects for its mismatch with the trainer; with `against: old`, mu is the trainer's old policy.
    """

    family: ClassVar[str] = "mask"

    divergence: Divergence = Field(description="what is compared, and how: see objectives/divergence.py")
    k: Positive = Field(default=20, description="tokens of mu that a topk divergence compares")
    against: Literal["rollout", "old"] = Field(
        default="rollout", description="whose probabilities mu are: the rollout engine's, or the old policy's"
    )
    cap: PositiveFloat = Field(default=20.0, description="largest ratio that weighs a token")

    @property
    def refuses(self) -> tuple[Pairing, ...]:
        found = [Pairing("ratio", ("response",), "it masks each token by the ratio of that token")]
        if self.against == "rollout":
            reason = (
                "it measures the ratio against the rollout policy, which contains that correction already; "
                "set correction none, or trust_region.against=old"
            )
            found.append(Pairing("correction", ("weight",), reason))
        return tuple(found)

    @property
    def reads(self) -> HeadRequest:
        if self._from_old:
            return HeadRequest(logp=True, topk=Support("old", self.k, 0.0))
        return HeadRequest(logp=True, at_rollout=self.rollout_k > 0)

    @property
    def reads_old(self) -> HeadRequest:
        return HeadRequest(logp=True, topk=Support("own", self.k, 0.0) if self._from_old else None)

    @property
    def rollout_k(self) -> int:
        return self.k if self._topk and self.against == "rollout" else 0

    @property
    def diagnostics(self) -> Diagnostics:
        return {
            "divergence": ("mean", "p99"),
            "masked": ("mean",),
            **decile_diagnostics("masked", "mean"),
        }

    @abstractmethod
    def gate(
        self, divergence: Tensor, log_rho: Tensor, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        """M [N] in [0, 1] from D [N] and log rho [N], all detached."""

    def surrogate(
        self, ratio: Tensor, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        behind = policy.old if self.against == "old" else inputs.rollout_logp
        log_rho = policy.logp.detach() - behind
        divergence = self.compare(policy.logp.detach(), behind, inputs)
        gate = self.gate(divergence, log_rho, inputs, statistics)
        rho = limited(log_rho).exp().clamp(max=self.cap)
        masked = (gate.value == 0).to(rho.dtype)
        per_token = {"divergence": divergence, "masked": masked} | by_decile("masked", masked, inputs)
        weight = gate.value * rho
        return Term(weight * policy.logp, per_token | gate.per_token, weight)

    def compare(self, logp: Tensor, behind: Tensor, inputs: ObjectiveInputs) -> Tensor:
        """D [N], from the log-probs of the sampled token under pi and mu."""
        if not self._topk:
            return binary(behind, logp, self.divergence)
        if self.against == "old":
            mu = record_of(inputs.old.topk, self.k, "old", KEY)
            log_pi = log_probs(record_of(inputs.new.topk, self.k, "new", KEY), "new").detach()
        else:
            mu = record_of(inputs.rollout_topk, self.k, "rollout", KEY)
            log_pi = at_rollout_of(inputs.new, "new", KEY)
        kept = first_slots(mu, self.k, union_sampled=True)
        return topk(log_probs(mu, self.against), log_pi, kept, mu.vocab, self.divergence)

    @property
    def _topk(self) -> bool:
        return self.divergence.startswith("topk")

    @property
    def _from_old(self) -> bool:
        return self._topk and self.against == "old"


def outward(log_rho: Tensor, advantage: Tensor) -> Tensor:
    """[N] bool, whether the update would move the sampled token further from mu; A = 0 counts as negative."""
    return torch.where(advantage > 0, log_rho > 0, log_rho < 0)
