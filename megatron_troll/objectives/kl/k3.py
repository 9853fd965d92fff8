"""k3: the estimator of GRPO (arXiv 2402.03300, eq. 4; ALGORITHMS 3)."""

from torch import Tensor

from megatron_troll.objectives import sampled_kl
from megatron_troll.objectives.sampled_kl import SampledKl


class K3(SampledKl):
    """k(x) = e^-x - 1 + x, coefficient 1 - e^-x. Unbiased and never negative as a value; on policy its
    gradient is that of the forward KL(reference || new)."""

    def estimate(self, x: Tensor) -> Tensor:
        return sampled_kl.k3(x, self.clamp)
