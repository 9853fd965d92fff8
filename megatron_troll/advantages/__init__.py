"""From the rewards of a rollout batch to advantages; one method a file, found by its name."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from megatron_troll.config.methods import SlotMethod


@dataclass(frozen=True)
class Values:
    """What a critic expects from each token on, before the update.

    value   [L] of every token that carries loss, response by response in order of position
    length  [B] int64, how many of them each response has; 0 for an empty one
    """

    value: Tensor
    length: Tensor


class Advantage(SlotMethod):
    """A method of the slot `advantage`."""

    @property
    def needs_groups(self) -> bool:
        """Whether a response is compared with others to its prompt, so that there must be two at least."""
        return True

    @property
    def needs_values(self) -> bool:
        """Whether a critic's values must be given; the advantages are then per token, [L]."""
        return False

    @abstractmethod
    def __call__(self, rewards: Tensor, group: Tensor, values: Values | None = None) -> Tensor:
        """rewards [B] float, group [B] int64: which prompt each response answers. Returns [B] (with values
        [L]), detached, in the dtype of rewards."""

    def targets(self, rewards: Tensor, values: Values) -> Tensor:
        """[L] what the critic should have expected from each token on."""
        raise NotImplementedError(f"{type(self).__name__} needs no critic")


@dataclass(frozen=True)
class PromptGroups:
    """Rewards against those of the other responses to the same prompt, float64.

    index   [B] which of the P prompts; size [P] float64, responses of each
    centred [B] reward less the mean of its prompt, exactly 0 where all are equal
    """

    index: Tensor
    size: Tensor
    centred: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """[B] -> [P]"""
        return values.new_zeros(len(self.size)).index_add(0, self.index, values)


def compare(rewards: Tensor, group: Tensor, method: str) -> PromptGroups:
    """Raises ValueError for a prompt with a single response: it has nothing to be compared with."""
    names, index, size = group.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise ValueError(
            f"prompts {names[size < 2].tolist()} have one response: {method} needs rollout.samples >= 2"
        )
    values = rewards.double()
    mean = values.new_zeros(len(names)).index_add(0, index, values) / size
    # Rounding of the mean must not become a signal where there is none.
    centred = (values - mean[index]).masked_fill(_all_equal(values, index, len(names))[index], 0.0)
    return PromptGroups(index, size.double(), centred)


def zero_variance(rewards: Tensor, group: Tensor) -> Tensor:
    """Fraction, as a scalar, of the prompts whose responses all have the same reward."""
    names, index = group.unique(return_inverse=True)
    return _all_equal(rewards, index, len(names)).to(rewards.dtype).mean()


def _all_equal(rewards: Tensor, index: Tensor, prompts: int) -> Tensor:
    """[P] bool"""
    zeros = rewards.new_zeros(prompts)
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return lowest == highest
