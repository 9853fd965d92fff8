"""Group-relative advantage (GRPO, arXiv 2402.03300; ALGORITHMS 0)."""

import torch
from torch import Tensor

from megatron_troll.advantages import Advantage


class Grpo(Advantage):
    """A_i = (R_i - mean) / (std + 1e-6) over the responses to one prompt; std with ddof 1, as in verl.

    The paper gives neither ddof nor the constant. Equal rewards give exactly 0. A group of one has no
    baseline and is refused.
    """

    def __call__(self, rewards: Tensor, group: Tensor) -> Tensor:
        names, index, size = group.unique(return_inverse=True, return_counts=True)
        if bool((size < 2).any()):
            raise ValueError(
                f"prompts {names[size < 2].tolist()} have one response: grpo needs rollout.samples >= 2"
            )
        values = rewards.double()
        zeros = values.new_zeros(len(names))
        lowest = zeros.scatter_reduce(0, index, values, "amin", include_self=False)
        highest = zeros.scatter_reduce(0, index, values, "amax", include_self=False)
        mean = zeros.index_add(0, index, values) / size
        centred = values - mean[index]
        std = (zeros.index_add(0, index, centred.square()) / (size - 1)).sqrt()
        advantage = centred / (std[index] + 1e-6)
        # Rounding of the mean must not become a signal where there is none.
        return torch.where((lowest == highest)[index], 0.0, advantage).to(rewards.dtype)
