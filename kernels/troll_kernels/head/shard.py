"""One shard of the vocabulary, and its logits in chunks of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from troll_kernels.transform import IDENTITY, Transform, widened

# Tokens whose logits are held at once: enough for the GEMM to run at full speed, and on CPU few enough to
# stay in the cache.
CPU_CHUNK, GPU_CHUNK = 128, 2048


def chunk_size(device: torch.device) -> int:
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


@dataclass(frozen=True)
class Shard:
    """A vocabulary shard. width: rows of weight that are tokens, not padding; chunk: tokens at a time."""

    width: int
    chunk: int
    transform: Transform = IDENTITY

    def chunks(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, hidden[rows] @ weight.T) for up to `chunk` rows at a time, [c, V_local] in the dtype
        of both. All chunks share one buffer: each overwrites the previous one."""
        buffer = hidden.new_empty(min(self.chunk, len(hidden)), len(weight))
        for start in range(0, len(hidden), self.chunk):
            rows = slice(start, min(start + self.chunk, len(hidden)))
            logits = buffer[: rows.stop - start]
            torch.mm(hidden[rows], weight.t(), out=logits)
            yield rows, logits


def grad_sums(weight: Tensor, main_grad: Tensor | None) -> Tensor:
    """The buffer that accumulates the gradient of weight: main_grad, or zeros in float32 or better."""
    return widened(weight[:0]).new_zeros(weight.shape) if main_grad is None else main_grad
