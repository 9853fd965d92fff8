"""dH of the sparse LM-head backward."""

from troll_kernels.dispatch import by_device
from troll_kernels.hidden_grad import ref

hidden_grad = by_device(ref.hidden_grad)

__all__ = ["hidden_grad"]
