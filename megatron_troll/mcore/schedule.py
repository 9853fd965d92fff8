"""Run micro-batches through Megatron's own schedules: no pipeline, 1F1B or interleaved 1F1B."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_troll.batching.held import at_rest
from megatron_troll.mcore.model import MegatronModel, forward, select_hidden
from megatron_troll.mcore.parallel import device, inside
from megatron_troll.mcore.router import share_counts, share_loads, start_counting, start_loads
from megatron_troll.types import MicroBatch

Read = Callable[[int, Tensor], Any]
Loss = Callable[[int, Tensor], tuple[Tensor, Any]]


def infer(model: MegatronModel, batches: Sequence[MicroBatch], read: Read) -> list[Any]:
    """Forward every micro-batch without gradient. On the last stage `read(i, hidden [N, h])` is called
    for each and its results are returned in order; other stages return []."""

    def last(i: int, hidden: Tensor) -> tuple[Tensor, Any]:
        return hidden.new_zeros(()), read(i, hidden)

    with torch.no_grad():
        return _run(model, batches, last, forward_only=True)


def accumulate(model: MegatronModel, batches: Sequence[MicroBatch], loss: Loss) -> list[Any]:
    """Run forward and backward of one optimizer step, starting from zero gradients. On the last stage
    `loss(i, hidden [N, h])` gives micro-batch i's share of the step's loss (a sum: nothing is
    averaged over micro-batches or ranks) and any value to return. Afterwards `main_grad` holds the gradients,
    and the routers the loads of their experts, summed over data- and context-parallel ranks. Blocks on every
    rank of the world."""
    for chunk in model.chunks:
        chunk.zero_grad_buffer()  # pyright: ignore[reportCallIssue]
    start_loads(model.chunks)
    results = _run(model, batches, loss, forward_only=False)
    share_loads(model.chunks, model.groups)
    return results


def step_loss(model: MegatronModel, parts: Sequence[Tensor]) -> float:
    """Sum the detached losses of all micro-batches of an optimizer step, `parts` being this rank's. Returns
    the same loss on every rank. Blocks on every rank."""
    groups = model.groups
    total = torch.stack([torch.zeros((), device=device()), *parts]).sum().double()
    groups.dp_cp.all_reduce(total)
    return float(groups.pp.broadcast(total, groups.pp.size - 1))


def survey(model: MegatronModel, batches: Sequence[MicroBatch], read: Read) -> list[Any]:
    """Run `infer` over the micro-batches of one optimizer step and count the loads of the experts, which the
    balancing loss needs before the first backward. Blocks on every rank."""
    start_counting(model.chunks)
    results = infer(model, batches, read)
    share_counts(model.chunks, model.groups.tp, model.groups.dp_cp)
    return results


def _run(model: MegatronModel, batches: Sequence[MicroBatch], loss: Loss, forward_only: bool) -> list[Any]:
    model.config.finalize_model_grads_func = _finalize
    iterators: list[Any] = [iter(enumerate(batches)) for _ in model.chunks]
    with inside(model.groups):
        return get_forward_backward_func()(
            forward_step_func=partial(_forward_step, model, loss),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=model.chunks if len(model.chunks) > 1 else model.chunks[0],
            num_microbatches=len(batches),
            seq_length=max(batch.tokens.numel() for batch in at_rest(batches)),
            micro_batch_size=1,
            forward_only=forward_only,
        )


def _forward_step(
    model: MegatronModel, loss: Loss, batches: Iterator[tuple[int, MicroBatch]], chunk: nn.Module
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    i, batch = next(batches)

    def finish(hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
        value, output = loss(i, select_hidden(model, hidden, batch.index))
        return value, torch.zeros((), dtype=torch.int), output

    return forward(model, chunk, batch), finish


def _finalize(chunks: list[nn.Module], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
    # Our loss weights already normalise over the step: Megatron must not divide by its token count.
    finalize_model_grads(chunks, None, **kwargs)
