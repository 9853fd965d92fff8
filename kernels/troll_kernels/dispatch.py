"""Choose which of the two implementations of an operation runs; no other module decides this.

The torch reference runs on CPU, in float64, and on GPUs that the Triton kernels do not support; otherwise the
Triton kernel runs. Choosing never waits for the device.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

# Needed for bf16 arithmetic and asynchronous copies. tools/check_kernels.py inspects the code for 9.0.
LOWEST_CAPABILITY = (8, 0)
# The most tokens per row that the Triton kernels keep; the references have no limit.
LARGEST_K = 256


def by_device[**P, R](reference: Callable[P, R]) -> Callable[P, R]:
    """Return the operation that `reference`, a function of `<operation>/ref.py`, specifies. On a supported
    GPU it calls the function of the same name in `<operation>/triton_kernel.py`, otherwise `reference`."""

    @wraps(reference)
    def operation(*args: P.args, **kwargs: P.kwargs) -> R:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        chosen = _kernel(reference) if _takes_kernel(tensors) else reference
        return chosen(*args, **kwargs)

    return operation


def _takes_kernel(tensors: list[Tensor]) -> bool:
    if tensors[0].device.type != "cuda" or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return supported(tensors[0].device.index)


def _kernel[**P, R](reference: Callable[P, R]) -> Callable[P, R]:
    module = reference.__module__.removesuffix(".ref") + ".triton_kernel"
    return getattr(importlib.import_module(module), reference.__name__)


@cache
def supported(device: int) -> bool:
    """Whether the Triton kernels run on this GPU. If they do not, warns once per device."""
    reason = _obstacle(device)
    if reason is not None:
        warnings.warn(f"GPU {device}: {reason}; the torch reference runs instead, slower", stacklevel=2)
    return reason is None


def _obstacle(device: int) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels were not made for ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < LOWEST_CAPABILITY:
        return f"compute capability {capability} is below {LOWEST_CAPABILITY}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None
