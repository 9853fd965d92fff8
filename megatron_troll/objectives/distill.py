"""Distillation of the policy into the model that samples its rollouts (Jackpot, arXiv 2602.06107, eq. 7)."""

import torch
from torch import Tensor, where

from megatron_troll.objectives.records import log_probs
from megatron_troll.objectives.slots import Diagnostics, Kl, Policy, Statistics, Term
from megatron_troll.types import HeadRequest, ObjectiveInputs, Support

# Masses are sums of exponentials of float32: a remainder 1 - mass below this is rounding.
REST = 1e-5


class Distillation(Kl):
    """K_t = KL(policy || rollout model) at the position of token t, the policy detached: exact on the kept
    tokens of the policy's record, with all other tokens merged into one. The policy's record is passed in
    place of the old policy's. K_t >= 0, and at most the KL over the vocabulary (data processing inequality).

    coef  weight of K_t;  k  tokens of the record besides the sampled one
    """

    coef: float
    k: int

    @property
    def record(self) -> Support:
        """The record to read from the policy."""
        return Support("own", self.k, 0.0)

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(topk=Support("old", self.k, 0.0), full=True)

    @property
    def diagnostics(self) -> Diagnostics:
        return {"distill_kl": ("mean", "max"), "distill_covered": ("mean", "min")}

    def penalty(self, inputs: ObjectiveInputs, policy: Policy, statistics: Statistics | None) -> Term:
        teacher, student = inputs.old.topk, inputs.new.topk
        if teacher is None or student is None:
            raise ValueError("distillation reads the policy's record, and the model's own at its ids")
        at_teacher = log_probs(teacher, "policy").detach()
        value = kept_kl(at_teacher, log_probs(student, "rollout model"), teacher.valid)
        covered = where(teacher.valid, at_teacher.exp(), 0.0).sum(1)
        return Term(self.coef * value, {"distill_kl": value.detach(), "distill_covered": covered})


def kept_kl(teacher: Tensor, student: Tensor, kept: Tensor) -> Tensor:
    """sum_S p log(p / q) + p_R log(p_R / q_R) [N] from log-probs [N, W] on the kept slots S, with R the rest;
    differentiable in the student. The last term is left out when p_R is only rounding."""
    log_p, log_q = (where(kept, logp, 0.0).double() for logp in (teacher, student))
    p, q = (where(kept, logp.exp(), 0.0) for logp in (log_p, log_q))
    rest = 1.0 - p.sum(1)
    left = rest.clamp(min=REST)
    ratio = left.log() - (1.0 - q.sum(1)).clamp(min=REST).log()
    value = (p * (log_p - log_q)).sum(1) + torch.where(rest > REST, left * ratio, 0.0)
    return value.to(student.dtype)
