"""GSPO: one ratio per response (arXiv 2507.18071; ALGORITHMS 4.1)."""

from typing import ClassVar

from torch import Tensor

from megatron_troll.objectives.slots import Policy, Ratio, lengths, unit
from megatron_troll.types import ObjectiveInputs

# Largest log of a sequence ratio, as in verl.
LARGEST = 10.0
# eps_low, eps_high of a clip of sequence ratios (TRL's paper index).
CLIP = 3e-4, 4e-4


def log_ratio(policy: Policy, inputs: ObjectiveInputs) -> Tensor:
    """[N] mean of log pi - log old over each token's response, at most 10; detached."""
    total = inputs.segments.sum((policy.logp - policy.old).detach())
    return (inputs.segments.expand(total) / lengths(inputs)).clamp(max=LARGEST)


class Gspo(Ratio):
    """s_i = exp(mean_t log r_t); each token carries s_it = sg(s_i) pi / sg(pi), which has the value s_i and,
    averaged over the response, its gradient.

    With `trust_region: clip` this is GSPO, whose bounds are not those of token ratios. Under `aggregation:
    seq-mean-token-mean` the loss is the paper's; other aggregations weigh a response by its length. With
    `trust_region: troll` s_i is the projected policy's, unclipped.
    """

    family: ClassVar[str] = "response"
    clip: ClassVar[tuple[float, float]] = CLIP

    def ratio(self, policy: Policy, inputs: ObjectiveInputs) -> Tensor:
        return log_ratio(policy, inputs).exp() * unit(policy.logp)
