"""k3 as a value with the gradient of k2 (verl's `low_var_kl+`; ALGORITHMS 3)."""

from torch import Tensor

from megatron_troll.objectives.sampled_kl import SampledKl, k3


class K3WithK2Gradient(SampledKl):
    """k(x) = k2 - sg(k2) + sg(k3): unbiased and never negative as a value; on policy its gradient is that
    of the reverse KL."""

    def estimate(self, x: Tensor) -> Tensor:
        k2 = x.square() / 2.0
        return k2 - k2.detach() + k3(x.detach(), self.clamp)
