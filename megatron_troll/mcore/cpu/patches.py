"""Patches that let megatron-core run on CPU with gloo.

Each entry names what it replaces and why; `tests/dist/test_cpu_patches.py` pins the list.
Everything else that Megatron-Core needs is set through its own flags and layer specs. `install` does nothing
if CUDA is available.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Patch:
    """One replaced attribute. `make` receives the original and returns the replacement."""

    owner: Any
    attribute: str
    reason: str
    make: Callable[[Any], Any]

    @property
    def name(self) -> str:
        return f"{getattr(self.owner, '__name__', self.owner)}.{self.attribute}"

    def apply(self) -> None:
        setattr(self.owner, self.attribute, self.make(getattr(self.owner, self.attribute, None)))


class CpuStream(torch.cpu.Stream):
    """A stream that is always done: CPU operations are synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def synchronize(self) -> None:
        return None

    def record_event(self) -> "CpuStream":  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return itself: callers use only `synchronize` of the event."""
        return self


def _without_cuda_literals(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapped


def _cuda_type_names(type_method: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_method(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return wrapped


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.cpu().numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _uneven_all_gather(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(outputs: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        rows = {output.size(0) for output in outputs if output.dim()}
        if len(rows) <= 1 or dist.get_backend(group) != "gloo":
            return all_gather(outputs, tensor, group=group, async_op=async_op)
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
        padded[: tensor.size(0)] = tensor
        parts = [torch.empty_like(padded) for _ in outputs]
        all_gather(parts, padded, group=group)
        for output, part in zip(outputs, parts, strict=True):
            output.copy_(part[: output.size(0)])
        return None

    return wrapped


def _on_one_device(original: Callable[..., None]) -> Callable[..., None]:
    gloo: Any = dist.ProcessGroupGloo  # its options are not in the stubs
    device = functools.cache(gloo.create_default_device)

    def init(self: Any, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        options = gloo._Options()
        options._devices, options._timeout = [device()], timeout
        original(self, store, rank, size, options)

    return init


def patches() -> tuple[Patch, ...]:
    """All patches, in the order they are applied. Imports the Megatron modules that they change."""
    import megatron.core.tensor_parallel.random as mcore_random
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    stream = CpuStream()
    cuda = torch.cuda
    return (
        Patch(cuda, "current_device", "device=torch.cuda.current_device() throughout",
              lambda _: torch.cpu.current_device),
        Patch(torch, "zeros", 'device="cuda" literals', _without_cuda_literals),
        Patch(torch, "tensor", 'device="cuda" literals; pinned memory in rope_utils', _without_cuda_literals),
        Patch(torch.Tensor, "cuda", "tensor.cuda() in rope_utils, exchange_utils, optimizer",
              lambda _: lambda self, *args, **kwargs: self),
        Patch(torch.Tensor, "type", "dtype names compared with 'torch.cuda.FloatTensor' in clip_grads, "
              "distrib_optimizer, optimizer", _cuda_type_names),
        Patch(cuda, "Stream", "token_dispatcher makes one", lambda _: CpuStream),
        Patch(cuda, "current_stream", "token_dispatcher waits on it", lambda _: lambda *_, **__: stream),
        Patch(cuda, "synchronize", "p2p_communication, timers", lambda _: torch.cpu.synchronize),
        Patch(token_dispatcher, "maybe_move_tensor_to_cpu", "converts to numpy only from a CUDA tensor",
              lambda _: _to_host),
        Patch(mcore_random, "_get_cuda_rng_state", "activation recompute saves the CUDA generator",
              lambda _: lambda *_, **__: torch.get_rng_state()),
        Patch(mcore_random, "_set_cuda_rng_state", "activation recompute restores it: torch would queue "
              "the call, and with it the state, until CUDA starts", lambda _: lambda *_, **__: None),
        Patch(dist, "all_gather", "gloo has no all_gather of unequal lists (ETP with EP)",
              _uneven_all_gather),
        Patch(dist.ProcessGroupGloo, "__init__", "each of some 25 groups of a layout would have a device, "
              "whose thread wakes 100 times a second", _on_one_device),
    )  # fmt: skip


@functools.cache
def install() -> tuple[str, ...]:
    """Apply the patches once per process and return their names; does nothing if CUDA is available."""
    if torch.cuda.is_available():
        return ()
    applied = patches()
    for patch in applied:
        patch.apply()
    return tuple(patch.name for patch in applied)
