"""Advantages from the rewards of a rollout batch; one method per file, found by its name."""

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from megatron_troll.config import SlotMethod


@dataclass(frozen=True)
class Values:
    """A critic's values before the update: the expected return from each token on.

    value   [L], one per token that carries loss, response by response in order of position
    length  [B] int64, number of such tokens in each response; 0 for an empty one
    """

    value: Tensor
    length: Tensor


class Advantage(SlotMethod):
    """A method of the slot `advantage`."""

    @property
    def needs_groups(self) -> bool:
        """Whether responses to one prompt are compared, so that each prompt needs at least two."""
        return True

    @property
    def needs_values(self) -> bool:
        """Whether a critic's values are required; the advantages are then per token, [L]."""
        return False

    @abstractmethod
    def __call__(self, rewards: Tensor, group: Tensor, values: Values | None = None) -> Tensor:
        """Advantages from rewards [B] float and group [B] int64, the prompt that each response answers.
        Returns [B] (with values [L]), detached, in the dtype of rewards."""

    def targets(self, rewards: Tensor, values: Values) -> Tensor:
        """[L] targets for the critic's values."""
        raise NotImplementedError(f"{type(self).__name__} needs no critic")


@dataclass(frozen=True)
class PromptGroups:
    """Rewards compared with those of the other responses to the same prompt, float64.

    index   [B] index of the response's prompt, below P
    size    [P] float64, number of responses to each prompt
    centred [B] reward minus the mean of its prompt, exactly 0 if all are equal
    """

    index: Tensor
    size: Tensor
    centred: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """[B] -> [P], sum over the responses to each prompt."""
        return values.new_zeros(len(self.size)).index_add(0, self.index, values)


def compare(rewards: Tensor, group: Tensor, method: str) -> PromptGroups:
    """Compare rewards within each prompt. Raises ValueError for a prompt with a single response."""
    names, index, size = group.unique(return_inverse=True, return_counts=True)
    if bool((size < 2).any()):
        raise ValueError(
            f"prompts {names[size < 2].tolist()} have one response: {method} needs rollout.samples >= 2"
        )
    values = rewards.double()
    mean = values.new_zeros(len(names)).index_add(0, index, values) / size
    # If all rewards are equal, rounding errors of the mean must not become a signal.
    centred = (values - mean[index]).masked_fill(_all_equal(values, index, len(names))[index], 0.0)
    return PromptGroups(index, size.double(), centred)


def zero_variance(rewards: Tensor, group: Tensor) -> Tensor:
    """Fraction (a scalar) of the prompts whose responses all have the same reward."""
    names, index = group.unique(return_inverse=True)
    return _all_equal(rewards, index, len(names)).to(rewards.dtype).mean()


def _all_equal(rewards: Tensor, index: Tensor, prompts: int) -> Tensor:
    """[P] bool, whether the rewards of each prompt are all equal."""
    zeros = rewards.new_zeros(prompts)
    lowest = zeros.scatter_reduce(0, index, rewards, "amin", include_self=False)
    highest = zeros.scatter_reduce(0, index, rewards, "amax", include_self=False)
    return lowest == highest
