"""From what the LM head multiplies out to the logits of the sampling law."""

from typing import NamedTuple

import torch
from torch import Tensor

from troll_kernels.numbers import LOWEST


class Transform(NamedTuple):
    """logit = x / temperature, or cap * tanh(x / cap) / temperature for models with a soft-cap.

    Increasing, so the order of tokens is that of the raw values x; -inf, a token ruled out, stays -inf.
    """

    temperature: float = 1.0
    cap: float | None = None

    def apply(self, raw: Tensor) -> Tensor:
        """Any shape; differentiable. The dtype stays."""
        if self.cap is not None:
            raw = torch.where(raw == LOWEST, raw, self.cap * torch.tanh(raw / self.cap))
        return raw if self.temperature == 1.0 else raw / self.temperature

    def slope(self, logits: Tensor) -> Tensor | float:
        """d logit / dx where the transformed value is `logits`."""
        if self.cap is None:
            return 1.0 / self.temperature
        return (1.0 - (logits * (self.temperature / self.cap)).clamp(min=-1.0).square()) / self.temperature


IDENTITY = Transform()
