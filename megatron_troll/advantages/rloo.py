"""Leave-one-out baseline (RLOO, arXiv 2402.14740, eq. 9)."""

from torch import Tensor

from megatron_troll.advantages import Advantage, Values, compare


class Rloo(Advantage):
    """A_i = R_i - mean over the other responses to the prompt = G / (G - 1) (R_i - mean)."""

    def __call__(self, rewards: Tensor, group: Tensor, values: Values | None = None) -> Tensor:
        groups = compare(rewards, group, "rloo")
        others = groups.size / (groups.size - 1)
        return (groups.centred * others[groups.index]).to(rewards.dtype)
