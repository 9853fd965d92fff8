"""Transform the raw output of the LM head into the logits of the sampling distribution; the dtypes and sizes
that the references share."""

from typing import NamedTuple

import torch
from torch import Tensor

LOWEST = float("-inf")
# Elements processed at once on CPU: few enough to stay in the cache over several passes.
CACHED = 2**19


def widened(x: Tensor) -> Tensor:
    """Return float64 tensors unchanged, all others in float32."""
    return x if x.dtype == torch.float64 else x.float()


class Transform(NamedTuple):
    """logit = x / temperature, or cap * tanh(x / cap) / temperature for models with a soft-cap.

    The map is increasing, so tokens keep the order of the raw values x; -inf (an excluded token) stays -inf.
    """

    temperature: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Transform raw values of any shape. Differentiable; keeps the dtype."""
        if self.cap is not None:
            raw = torch.where(raw == LOWEST, raw, self.cap * torch.tanh(raw / self.cap))
        return raw if self.temperature == 1.0 else raw / self.temperature

    def slope(self, logits: Tensor) -> Tensor | float:
        """Return d logit / dx at the raw values x whose transformed values are `logits`."""
        if self.cap is None:
            return 1.0 / self.temperature
        # The clamp gives an excluded token, whose logit is -inf, the slope 0.
        return (1.0 - (logits * (self.temperature / self.cap)).clamp(min=-1.0).square()) / self.temperature


IDENTITY = Transform()
