"""Gradient size by the frequency of the sampled token (arXiv 2604.13088; ALGORITHMS 4)."""

import torch
from torch import Tensor

from megatron_troll.objectives.slots import Diagnostics, Method, logp_of
from megatron_troll.types import HeadRequest, ObjectiveInputs

# Bucket i: tokens whose share of the rollout batch is at least EDGES[i] and, for i > 0, below EDGES[i - 1].
# The last bucket holds the rest.
EDGES = (1e-1, 1e-2, 1e-3, 1e-4)
BUCKETS = len(EDGES) + 1


class Energy(Method):
    """|g_t| = |d J / d log pi(o_t)| || onehot(o_t) - softmax ||_2, the gradient of the logits through the
    sampled token's log-prob: a proxy, because parameter gradients of single tokens are not available. It
    leaves out gradients that reach the logits another way (TROLL's regression, a KL over many tokens, an
    entropy bonus).

    The paper's Energy(B) of bucket i is the mean of `energy_bucket_i` divided by the mean of `energy`.
    """

    @property
    def reads(self) -> HeadRequest:
        return HeadRequest(logp=True, collision=True)

    @property
    def diagnostics(self) -> Diagnostics:
        buckets = [f"{name}_bucket_{i}" for name in ("energy", "tokens") for i in range(BUCKETS)]
        return dict.fromkeys(("energy", *buckets), ("mean",))

    def measure(self, total: Tensor, logp: Tensor, inputs: ObjectiveInputs) -> dict[str, Tensor]:
        """Diagnostics, name -> [N]. total: the weighted sum of J, computed from the policy's logp [N].
        Runs a backward from `total` to `logp`."""
        if inputs.frequency is None or inputs.new.collision is None:
            raise ValueError("energy reads token frequencies and the policy's collision probability")
        (slope,) = torch.autograd.grad(total, logp, retain_graph=True, allow_unused=True)
        if slope is None:
            slope = torch.zeros_like(logp)
        p = logp_of(inputs.new, "new").detach().exp()
        size = slope.abs() * (1.0 - 2.0 * p + inputs.new.collision).clamp(min=0.0).sqrt()
        edges = torch.tensor(EDGES, dtype=inputs.frequency.dtype, device=p.device)
        bucket = (inputs.frequency[:, None] < edges).sum(1)
        parts = {"energy": size}
        for i in range(BUCKETS):
            inside = (bucket == i).to(size.dtype)
            parts |= {f"energy_bucket_{i}": size * inside, f"tokens_bucket_{i}": inside}
        return parts
