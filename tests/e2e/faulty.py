"""An engine and a trust region that go wrong, named by import path."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_troll.config import Sampling
from megatron_troll.objectives.slots import Policy, Statistics, Term
from megatron_troll.objectives.trust_region.clip import Clip
from megatron_troll.rollout.engine import Request
from megatron_troll.rollout.engines.inprocess import InProcessEngine
from megatron_troll.types import ObjectiveInputs, Rollout

MARK = -1e4


class Unreliable(InProcessEngine):
    """Loses the log-prob of one token in round 1, and from round 3 on marks one token for `Brittle`."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, round: int) -> list[Rollout]:
        rollouts = super().generate(requests, sampling, round)
        if round == 1:
            rollouts[5] = with_logp(rollouts[5], float("nan"))
        if round >= 3:
            rollouts[2] = with_logp(rollouts[2], MARK)
        return rollouts


class Brittle(Clip):
    """Gives NaN for a marked token."""

    def surrogate(
        self, ratio: torch.Tensor, policy: Policy, inputs: ObjectiveInputs, statistics: Statistics | None
    ) -> Term:
        term = super().surrogate(ratio, policy, inputs, statistics)
        return replace(term, value=torch.where(inputs.rollout_logp == MARK, torch.nan, term.value))


def with_logp(rollout: Rollout, value: float) -> Rollout:
    """`rollout` whose first token has the log-prob `value`."""
    logp = rollout.logp.copy()
    logp[0] = value
    return replace(rollout, logp=logp)
