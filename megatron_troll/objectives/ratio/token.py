"""Importance ratio of each token (PPO, arXiv 1707.06347; ALGORITHMS 0)."""

import torch
from torch import Tensor

from megatron_troll.objectives.slots import Policy, Ratio
from megatron_troll.types import ObjectiveInputs


class Token(Ratio):
    """r_t = pi(o_t) / old(o_t); the log-ratio is clamped to [-20, 20] before exp, as in verl."""

    def ratio(self, policy: Policy, inputs: ObjectiveInputs) -> Tensor:
        return torch.exp((policy.logp - policy.old).clamp(-20.0, 20.0))
