"""The elementwise part of the dense LM-head backward, in place."""

from troll_kernels.dispatch import by_device
from troll_kernels.logits_grad import ref

to_logits_grad = by_device(ref.to_logits_grad)

__all__ = ["to_logits_grad"]
