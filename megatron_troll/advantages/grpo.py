"""Group-relative advantage (GRPO, arXiv 2402.03300; ALGORITHMS 0)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from megatron_troll.advantages import Advantage, Values, compare


class Grpo(Advantage):
    """A_i = (R_i - mean) / (std + 1e-6) over the responses to one prompt; ddof 1 and the constant as in verl.

    The paper specifies neither. Equal rewards give exactly 0. A group of one has no baseline: ValueError.
    """

    ddof: Literal[0, 1] = Field(default=1, description="1: sample standard deviation; 0: population")

    def __call__(self, rewards: Tensor, group: Tensor, values: Values | None = None) -> Tensor:
        groups = compare(rewards, group, "grpo")
        std = (groups.sum(groups.centred.square()) / (groups.size - self.ddof)).sqrt()
        return (groups.centred / (std[groups.index] + 1e-6)).to(rewards.dtype)
