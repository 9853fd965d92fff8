"""Centred reward (Dr. GRPO, arXiv 2503.20783; ALGORITHMS 0)."""

from torch import Tensor

from megatron_troll.advantages import Advantage, Values, compare


class DrGrpo(Advantage):
    """A_i = R_i - mean over the responses to one prompt: not divided by the standard deviation, which would
    give more weight to prompts whose rewards vary less. The paper combines it with `aggregation:
    seq-mean-token-sum-norm`."""

    def __call__(self, rewards: Tensor, group: Tensor, values: Values | None = None) -> Tensor:
        return compare(rewards, group, "dr_grpo").centred.to(rewards.dtype)
