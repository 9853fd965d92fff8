"""xIELU (arXiv:2411.13010), the activation of Apertus, with learned scalars for each layer."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_troll.mcore.delta_rule import wide


class XIELU(MegatronModule):
    """The activation of one layer; each scalar is a tensor [1]. Tensor-parallel ranks hold the same scalars
    and apply them to their own columns, so that their gradients are summed over these ranks, as are those of
    norms.

    alpha_p, alpha_n   learned; softplus makes them positive
    beta, eps          constants that checkpoints store
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)
        for name in ("alpha_p", "alpha_n", "beta", "eps"):
            scalar: Any = nn.Parameter(torch.empty(1, dtype=config.params_dtype))
            scalar.requires_grad = name.startswith("alpha")
            scalar.sequence_parallel = config.sequence_parallel
            self.register_parameter(name, scalar)

    def forward(self, x: Tensor) -> Tensor:
        activated: Any = _XIELU.apply(x, self.alpha_p, self.alpha_n, self.beta, self.eps)
        return activated


class _XIELU(torch.autograd.Function):
    """p x^2 + beta x for x > 0, otherwise n (exp(min(x, eps)) - 1 - x) + beta x, with p = softplus(alpha_p)
    and n = beta + softplus(alpha_n); computed in fp32. Saves its arguments."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor) -> Tensor:
        ctx.save_for_backward(x, alpha_p, alpha_n, beta, eps)
        xs, p, n, b, e = _wide(x, alpha_p, alpha_n, beta, eps)
        below = torch.minimum(xs, e).expm1_().sub_(xs).mul_(n)
        return torch.where(xs > 0, p * xs * xs, below).addcmul_(b, xs).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, alpha_p, alpha_n, beta, eps = ctx.saved_tensors
        xs, p, n, b, e = _wide(x, alpha_p, alpha_n, beta, eps)
        above = xs > 0
        clipped = torch.minimum(xs, e)
        slope = torch.where(above, 2 * p * xs, n * (clipped.exp().mul_(xs < e) - 1)).add_(b)
        # What p and n are multiplied by, where it is not the other.
        factor = torch.where(above, xs * xs, clipped.expm1_().sub_(xs)).mul_(grad)
        of_p, of_n = torch.where(above, factor, 0).sum(), torch.where(above, 0, factor).sum()
        return (
            slope.mul_(grad).to(x.dtype),
            (of_p * wide(alpha_p).sigmoid()).to(alpha_p.dtype),
            (of_n * wide(alpha_n).sigmoid()).to(alpha_n.dtype),
            None,
            None,
        )


def _wide(
    x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: Tensor, eps: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, p, n, beta and eps, in fp32 or wider; p and n are rounded to the dtype of the scalars, as in
    transformers and SGLang."""
    p, n = F.softplus(alpha_p), beta + F.softplus(alpha_n)
    return wide(x), wide(p), wide(n), wide(beta), wide(eps)
