"""k2: half the squared log-ratio (Schulman, "Approximating KL Divergence", 2020; ALGORITHMS 3)."""

from torch import Tensor

from megatron_troll.objectives.sampled_kl import SampledKl


class K2(SampledKl):
    """k(x) = x^2 / 2, coefficient x: on policy, its expected gradient is that of the reverse KL. Biased as
    a value."""

    def estimate(self, x: Tensor) -> Tensor:
        return x.square() / 2.0
