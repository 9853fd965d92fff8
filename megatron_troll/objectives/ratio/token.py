"""Importance ratio of each token (PPO, arXiv 1707.06347; ALGORITHMS 0)."""

from torch import Tensor

from megatron_troll.objectives.slots import Policy, Ratio, importance_ratio
from megatron_troll.types import ObjectiveInputs


class Token(Ratio):
    """r_t = pi(o_t) / old(o_t); the log-ratio is clamped to [-20, 20] before exp, as in verl."""

    def ratio(self, policy: Policy, inputs: ObjectiveInputs) -> Tensor:
        return importance_ratio(policy.logp, policy.old)
