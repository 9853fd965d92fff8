"""Megatron's overlapped gradient reduction and the LM head.

Megatron reduces a bucket of gradients as soon as autograd has passed each of its weights. The head adds the
gradient of its weight to `main_grad` by itself, without autograd, and so has to say when that is complete.
"""

from collections.abc import Callable
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_troll.mcore.model import MegatronModel


def reporting(hidden: Tensor, model: MegatronModel) -> Tensor:
    """`hidden` [N, h] for one reading of the head a micro-batch: when backward has passed everything that
    reads it, the gradient of the head's weight counts as complete.

    Megatron counts in its first step how often each weight is reported, and waits for as many reports: where
    the embedding of the same stage is tied to the head, for its own too.
    """
    chunk = model.chunks[-1]
    if not isinstance(chunk, DistributedDataParallel) or not chunk.ddp_config.overlap_grad_reduce:
        return hidden
    weight = model.stages[-1].output_weight
    group: Any = chunk.param_to_bucket_group[weight]

    def ready() -> None:
        group.register_grad_ready(weight, chunk.force_all_reduce)

    result = _Reporting.apply(hidden, ready)
    assert isinstance(result, Tensor)
    return result


class _Reporting(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ready: Callable[[], None]) -> Tensor:
        ctx.ready = ready
        return hidden.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.ready()
        return upstream, None
