"""k1: the log-ratio itself (Schulman, "Approximating KL Divergence", 2020; ALGORITHMS 3)."""

from torch import Tensor

from megatron_troll.objectives.sampled_kl import SampledKl


class K1(SampledKl):
    """k(x) = x, coefficient 1. Unbiased as a value, may be negative; on policy its gradient is 0 in
    expectation, so that on its own it does not keep the policy near the reference."""

    def estimate(self, x: Tensor) -> Tensor:
        return x
