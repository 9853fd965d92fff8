"""RMSNorm in fp32 that also knows sequence parallelism, which Megatron's torch wrapper refuses."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """weight * x / rms(x). The gradient of `weight` is summed over tensor-parallel ranks, which see other
    tokens or other heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # pyright: ignore[reportAttributeAccessIssue]

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self._normed(hidden).to(hidden.dtype)

    def _normed(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)


class ZeroCentredRMSNorm(RMSNorm):
    """(1 + weight) * x / rms(x)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return ((1.0 + self.weight.float()) * self._normed(hidden)).to(hidden.dtype)
