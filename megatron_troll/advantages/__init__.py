"""From the rewards of a rollout batch to advantages; one method a file, found by its name."""

from abc import abstractmethod

from torch import Tensor

from megatron_troll.config.tree import Node


class Advantage(Node):
    """A method of the slot `advantage`; its fields are its configuration."""

    @abstractmethod
    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        """rewards [B] float, group [B] int64: which prompt each response answers. Returns [B], detached,
        in the dtype of rewards."""


def zero_variance(rewards: Tensor, group: Tensor) -> Tensor:
    """Fraction, as a scalar, of the prompts whose responses all have the same reward."""
    names, index = group.unique(return_inverse=True)
    zeros = rewards.new_zeros(len(names))
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return (lowest == highest).to(rewards.dtype).mean()
