"""dW of the sparse LM-head backward, added into a gradient buffer."""

from troll_kernels.dispatch import by_device
from troll_kernels.weight_grad import ref

add_weight_grad = by_device(ref.add_weight_grad)

__all__ = ["add_weight_grad"]
